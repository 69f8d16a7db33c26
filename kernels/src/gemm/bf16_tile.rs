//! The innermost loops of a bfloat16 product: one tile, with f32 sums.
//!
//! A lane is a pair of bfloat16 numbers of consecutive `k`, the even one in its low half. A step adds the product of the odd
//! halves to the sum, then that of the even halves, rounding to nearest even after each, with denormals taken as zero.
//! This is the arithmetic of the instruction `vdpbf16ps`; the other versions reproduce it, so results do not depend on the
//! instruction set.

use super::bf16::{Pair, flushed};
use super::panel::{MR, NR, Out};
use crate::isa::per_isa;

/// Adds the products of two packed panels, in the order of `k`, for the first `rows` rows of a tile.
///
/// # Safety
/// As for [`super::tile::accumulate`].
pub unsafe fn accumulate(rows: usize, a: &[Pair], b: &[Pair], out: Out) {
    assert!(rows <= MR && a.len() / MR == b.len() / NR, "panels of unequal depth");
    #[cfg(target_arch = "x86_64")]
    if super::bf16::has_dot() {
        // SAFETY: the machine has AVX-512-BF16; the panels are equally deep; the caller's promise.
        return unsafe { x86::dot(rows, a, b, out) };
    }
    #[cfg(target_arch = "aarch64")]
    if crate::isa::Isa::detect() == crate::isa::Isa::Neon {
        // SAFETY: the panels are equally deep; the caller's promise.
        return unsafe { super::neon::bf16_tile(rows, a, b, out) };
    }
    for i in 0..rows {
        // SAFETY: the caller's promise.
        let row = unsafe { &mut *out.start.add(i * out.stride).cast::<[f32; NR]>() };
        if !out.add {
            row.fill(0.0);
        }
        portable_row(i, a, b, row);
    }
}

per_isa! {
    /// Row `i` of a tile, without the instruction.
    fn portable_row(i: usize, a: &[Pair], b: &[Pair], row: &mut [f32; NR]) {
        for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
            let (low, high) = (flushed(a[i].0 << 16), flushed(a[i].0 & 0xffff_0000));
            for j in 0..NR {
                let odd = high.mul_add(flushed(b[j].0 & 0xffff_0000), row[j]);
                row[j] = flushed(low.mul_add(flushed(b[j].0 << 16), flushed(odd.to_bits())).to_bits());
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::gemm::bf16::Pair;
    use crate::gemm::panel::{MR, NR, Out};
    use crate::gemm::tile::avx512_kernel;
    use std::arch::x86_64::*;

    // The transmutes are between vectors of integers and of bfloat16 pairs: of equal size, without invalid values.
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
    use crate::gemm::bf16::round;
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
                portable_row(i, &a, &b, row);
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
}
