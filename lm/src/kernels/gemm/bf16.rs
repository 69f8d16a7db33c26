//! bfloat16 tiles: two products a lane and step, summed in f32.
//!
//! A lane holds two consecutive `k`, the even one in its low half. Each step adds the odd product to the sum and
//! then the even one, rounding to nearest even after each, with denormals taken as zero: the arithmetic of
//! `vdpbf16ps`. The portable code does the same by hand, so results do not depend on the instruction set.

use super::tile::{MR, NR, Out};
use crate::kernels::isa::per_isa;

/// Two bfloat16 numbers, the first in the low half.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pair(pub u32);

/// The bits of `x` rounded to the nearest bfloat16, ties to even; a NaN stays one.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded as u16 }
}

/// The f32 of a bfloat16's bits.
#[inline(always)]
pub fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

per_isa! {
    /// [`round`] for every element.
    pub fn round_row(x: &[f32], out: &mut [u16]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = round(x);
        }
    }
}

/// Sums the products of two packed panels, in the order of `k`, for the first `rows` rows of a tile.
///
/// # Safety
/// As for [`super::tile::accumulate`].
pub unsafe fn accumulate(rows: usize, a: &[Pair], b: &[Pair], out: Out) {
    assert!(rows <= MR && a.len() / MR == b.len() / NR, "panels of unequal depth");
    #[cfg(target_arch = "x86_64")]
    if has_dot() {
        // SAFETY: the machine has AVX-512-BF16; the panels are equally deep; the caller's promise.
        return unsafe { x86::dot(rows, a, b, out) };
    }
    for i in 0..rows {
        // SAFETY: the caller's promise.
        let row = unsafe { &mut *out.start.add(i * out.stride).cast::<[f32; NR]>() };
        if !out.add {
            row.fill(0.0);
        }
        by_hand(i, a, b, row);
    }
}

/// Whether products run on AVX-512-BF16.
#[cfg(target_arch = "x86_64")]
fn has_dot() -> bool {
    use crate::kernels::Isa;
    static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FOUND.get_or_init(|| Isa::detect() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16"))
}

per_isa! {
    /// Row `i` of a tile.
    fn by_hand(i: usize, a: &[Pair], b: &[Pair], row: &mut [f32; NR]) {
        for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
            let (low, high) = (flushed(a[i].0 << 16), flushed(a[i].0 & 0xffff_0000));
            for j in 0..NR {
                let odd = high.mul_add(flushed(b[j].0 & 0xffff_0000), row[j]);
                row[j] = flushed(low.mul_add(flushed(b[j].0 << 16), flushed(odd.to_bits())).to_bits());
            }
        }
    }
}

/// A denormal as a zero of its sign.
#[inline(always)]
fn flushed(bits: u32) -> f32 {
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{MR, NR, Out, Pair};
    use crate::kernels::gemm::tile::avx512_kernel;
    use std::arch::x86_64::*;

    // A vector of integers and one of bfloat16 pairs have the same size and no invalid values.
    avx512_kernel!(
        dot,
        "avx512f,avx512bf16",
        Pair,
        |b| std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.cast())),
        |a| std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32((*a).0 as i32)),
        |x, b, sum| _mm512_dpbf16_ps(sum, x, b)
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    fn panel(width: usize, depth: usize, id: u64) -> Vec<Pair> {
        let stream = Stream::new(3, id);
        (0..(width * depth) as u64)
            .map(|i| {
                let half = |j: u64| round(stream.normal(2 * i + j) as f32 * 10f32.powi((i % 9) as i32 - 4)) as u32;
                Pair(half(0) | half(1) << 16)
            })
            .collect()
    }

    #[test]
    fn the_instruction_and_the_portable_code_agree_to_the_bit() {
        let (a, b) = (panel(MR, 301, 1), panel(NR, 301, 2));
        for rows in 1..=MR {
            let (mut want, mut got) = ([0.25; MR * NR], [0.25; MR * NR]);
            for (i, row) in want.as_chunks_mut::<NR>().0[..rows].iter_mut().enumerate() {
                by_hand(i, &a, &b, row);
            }
            // SAFETY: a whole tile.
            unsafe { accumulate(rows, &a, &b, Out::tile(&mut got, true)) };
            assert_eq!(got[..rows * NR].map_bits(), want[..rows * NR].map_bits(), "{rows} rows");
        }
    }

    trait Bits {
        fn map_bits(&self) -> Vec<u32>;
    }
    impl Bits for [f32] {
        fn map_bits(&self) -> Vec<u32> {
            self.iter().map(|x| x.to_bits()).collect()
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        for (x, want) in [
            (1.0f32, 0x3f80),
            (1.0 + 1.0 / 256.0, 0x3f80),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (-0.0, 0x8000),
            (f32::MAX, 0x7f80),
        ] {
            assert_eq!(round(x), want, "{x}");
        }
        assert!(widen(round(f32::NAN)).is_nan());
        assert_eq!(widen(round(f32::INFINITY)), f32::INFINITY);
    }
}
