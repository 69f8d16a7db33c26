//! The innermost loops of products on NEON. They compute the same bits as the portable code.

use std::arch::aarch64::*;

use super::bf16::{Pair, flushed};
use super::panel::{MR, NR, Out};

/// Vectors per row of a tile.
const VECTORS: usize = NR / 4;

/// [`super::tile::accumulate`] on NEON.
///
/// # Safety
/// `a` and `b` are equally deep panels; the rule of [`super::tile::accumulate`] for `out`. No row past `rows` is touched.
pub unsafe fn f32_tile(rows: usize, a: &[f32], b: &[f32], out: Out) {
    // Three rows of sums use 24 of the 32 vector registers.
    for first in (0..rows).step_by(3) {
        // SAFETY: the caller's promise.
        unsafe {
            match rows - first {
                1 => f32_rows::<1>(first, a, b, out),
                2 => f32_rows::<2>(first, a, b, out),
                _ => f32_rows::<3>(first, a, b, out),
            }
        }
    }
}

#[inline(always)]
unsafe fn f32_rows<const R: usize>(first: usize, a: &[f32], b: &[f32], out: Out) {
    let depth = a.len() / MR;
    // SAFETY: `a` has `depth * MR` and `b` has `depth * NR` elements; rows `first .. first + R` exist at `out`.
    unsafe {
        let mut c = load::<R>(first, out);
        let (mut pa, mut pb) = (a.as_ptr().add(first), b.as_ptr());
        let mut ahead = out.fetch.ahead_of(pb);
        for _ in 0..depth {
            ahead.go_on();
            let x: [f32; R] = std::array::from_fn(|i| *pa.add(i));
            for j in 0..VECTORS {
                let y = vld1q_f32(pb.add(4 * j));
                for (row, &x) in c.iter_mut().zip(&x) {
                    row[j] = vfmaq_n_f32(row[j], y, x);
                }
            }
            pa = pa.wrapping_add(MR);
            pb = pb.add(NR);
        }
        store(first, &c, out);
    }
}

/// [`super::bf16_tile::accumulate`] on NEON: adds the odd product of each pair, then the even one; denormals are taken as
/// zero.
///
/// # Safety
/// As for [`f32_tile`].
pub unsafe fn bf16_tile(rows: usize, a: &[Pair], b: &[Pair], out: Out) {
    for first in (0..rows).step_by(2) {
        // SAFETY: the caller's promise.
        unsafe {
            match rows - first {
                1 => bf16_rows::<1>(first, a, b, out),
                _ => bf16_rows::<2>(first, a, b, out),
            }
        }
    }
}

#[inline(always)]
unsafe fn bf16_rows<const R: usize>(first: usize, a: &[Pair], b: &[Pair], out: Out) {
    let depth = a.len() / MR;
    // SAFETY: as in `f32_rows`; a pair is a `u32`.
    unsafe {
        let mut c = load::<R>(first, out);
        let (mut pa, mut pb) = (a.as_ptr().add(first), b.as_ptr().cast::<u32>());
        let mut ahead = out.fetch.ahead_of(pb);
        for _ in 0..depth {
            ahead.go_on();
            let low: [f32; R] = std::array::from_fn(|i| flushed((*pa.add(i)).0 << 16));
            let high: [f32; R] = std::array::from_fn(|i| flushed((*pa.add(i)).0 & 0xffff_0000));
            for j in 0..VECTORS {
                let pairs = vld1q_u32(pb.add(4 * j));
                let even = flush(vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)));
                let odd = flush(vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))));
                for (i, row) in c.iter_mut().enumerate() {
                    let sum = flush(vfmaq_n_f32(row[j], odd, high[i]));
                    row[j] = flush(vfmaq_n_f32(sum, even, low[i]));
                }
            }
            pa = pa.wrapping_add(MR);
            pb = pb.add(NR);
        }
        store(first, &c, out);
    }
}

/// Replaces denormals by zeros of the same sign.
#[inline(always)]
unsafe fn flush(x: float32x4_t) -> float32x4_t {
    // SAFETY: NEON is part of every AArch64.
    unsafe {
        let bits = vreinterpretq_u32_f32(x);
        let normal = vtstq_u32(bits, vdupq_n_u32(0x7f80_0000));
        vreinterpretq_f32_u32(vandq_u32(bits, vorrq_u32(normal, vdupq_n_u32(0x8000_0000))))
    }
}

/// The initial sums of `R` rows from row `first` on.
#[inline(always)]
unsafe fn load<const R: usize>(first: usize, out: Out) -> [[float32x4_t; VECTORS]; R] {
    // SAFETY: the caller's promise: the rows exist.
    unsafe {
        let start = out.start.add(first * out.stride);
        std::array::from_fn(|i| {
            std::array::from_fn(
                |j| if out.add { vld1q_f32(start.add(i * out.stride + 4 * j)) } else { vdupq_n_f32(0.0) },
            )
        })
    }
}

#[inline(always)]
unsafe fn store<const R: usize>(first: usize, c: &[[float32x4_t; VECTORS]; R], out: Out) {
    // SAFETY: as in `load`.
    unsafe {
        let start = out.start.add(first * out.stride);
        for (i, row) in c.iter().enumerate() {
            for (j, &x) in row.iter().enumerate() {
                vst1q_f32(start.add(i * out.stride + 4 * j), x);
            }
        }
    }
}
