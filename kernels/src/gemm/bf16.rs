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

/// The bits of `x` rounded to the nearest bfloat16, ties to even; a NaN stays one, and a denormal is a zero of its sign, as
/// the instruction has it.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let rounded = if x.is_nan() { (bits >> 16) | 0x40 } else { rounded };
    (if bits & 0x7f80_0000 == 0 { (bits >> 16) & 0x8000 } else { rounded }) as u16
}

/// The f32 of a bfloat16's bits.
#[inline(always)]
pub fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// [`round`] for every element.
pub fn round_row(x: &[f32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if has_dot() {
        // SAFETY: the machine has AVX-512-BF16.
        return unsafe { x86::round_row(x, out) };
    }
    round_each(x, out);
}

per_isa! {
    fn round_each(x: &[f32], out: &mut [u16]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = round(x);
        }
    }
}

/// `out[i]` is elements `2 i` and `2 i + 1` of `row`, rounded, the second maybe missing at the end.
pub fn pair_row(row: &[f32], out: &mut [Pair]) {
    #[cfg(target_arch = "x86_64")]
    if has_dot() {
        let whole = row.len() / 2;
        // SAFETY: the machine has AVX-512-BF16; a pair lies as its two numbers do.
        unsafe {
            let numbers = std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), 2 * whole.min(out.len()));
            x86::round_row(&row[..numbers.len()], numbers);
        }
        if let (true, Some(out)) = (row.len() % 2 == 1, out.get_mut(whole)) {
            *out = Pair(round(row[row.len() - 1]) as u32);
        }
        return;
    }
    pair_each(row, out);
}

per_isa! {
    fn pair_each(row: &[f32], out: &mut [Pair]) {
        let (whole, last) = row.as_chunks::<2>();
        for (out, [l, h]) in out.iter_mut().zip(whole) {
            *out = Pair(round(*l) as u32 | (round(*h) as u32) << 16);
        }
        if let ([x], Some(out)) = (last, out.get_mut(whole.len())) {
            *out = Pair(round(*x) as u32);
        }
    }
}

/// `out[i] = (low[i], high[i])`, rounded.
pub fn zip_rows(low: &[f32], high: &[f32], out: &mut [Pair]) {
    #[cfg(target_arch = "x86_64")]
    if has_dot() {
        // SAFETY: the machine has AVX-512-BF16.
        return unsafe { x86::zip_rows(low, high, out) };
    }
    zip_each(low, high, out);
}

per_isa! {
    fn zip_each(low: &[f32], high: &[f32], out: &mut [Pair]) {
        for ((out, &l), &h) in out.iter_mut().zip(low).zip(high) {
            *out = Pair(round(l) as u32 | (round(h) as u32) << 16);
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
    #[cfg(target_arch = "aarch64")]
    if crate::kernels::Isa::detect() == crate::kernels::Isa::Neon {
        // SAFETY: the panels are equally deep; the caller's promise.
        return unsafe { super::neon::bf16_tile(rows, a, b, out) };
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
pub(super) fn flushed(bits: u32) -> f32 {
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{MR, NR, Out, Pair, round};
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

    /// # Safety
    /// The machine has AVX-512-BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn round_row(x: &[f32], out: &mut [u16]) {
        let (whole, rest) = x.as_chunks::<32>();
        let (rows, ends) = out.split_at_mut(32 * whole.len());
        for (x, out) in whole.iter().zip(rows.as_chunks_mut::<32>().0) {
            // SAFETY: both halves of 32 floats are read, and 32 halves of the result written.
            unsafe {
                let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
            }
        }
        for (out, &x) in ends.iter_mut().zip(rest) {
            *out = round(x);
        }
    }

    /// # Safety
    /// The machine has AVX-512-BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn zip_rows(low: &[f32], high: &[f32], out: &mut [Pair]) {
        let n = low.len().min(high.len()).min(out.len());
        let wide = |x: __m512| {
            let rounded = _mm512_cvtneps_pbh(x);
            // SAFETY: a vector of bfloat16 and one of integers have the same size and no invalid values.
            _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(rounded) })
        };
        for i in (0..n).step_by(16) {
            // All sixteen, or those that are left: the rows of a tile are fewer.
            let there = u16::MAX >> (16 - (n - i).min(16));
            // SAFETY: the elements that are marked exist in each.
            unsafe {
                let l = _mm512_maskz_loadu_ps(there, low.as_ptr().add(i));
                let h = _mm512_maskz_loadu_ps(there, high.as_ptr().add(i));
                let both = _mm512_or_si512(wide(l), _mm512_slli_epi32::<16>(wide(h)));
                _mm512_mask_storeu_epi32(out.as_mut_ptr().add(i).cast(), there, both);
            }
        }
    }
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
    fn rows_are_rounded_alike_with_and_without_the_instruction() {
        let stream = Stream::new(4, 4);
        let mut x: Vec<f32> = (0..203).map(|i| stream.normal(i) as f32 * 10f32.powi((i % 77) as i32 - 38)).collect();
        x[..7].copy_from_slice(&[
            f32::NAN,
            f32::INFINITY,
            -f32::INFINITY,
            f32::MAX,
            1e-39,
            -1e-40,
            f32::from_bits(0x7f_ffff),
        ]);
        let (mut got, mut want) = (vec![0; x.len()], vec![0; x.len()]);
        round_row(&x, &mut got);
        round_each(&x, &mut want);
        assert_eq!(got, want);
        for n in [0usize, 1, 31, 64, 101, 203] {
            let empty = || vec![Pair(7); n.div_ceil(2)];
            let (mut got, mut want) = (empty(), empty());
            pair_row(&x[..n], &mut got);
            pair_each(&x[..n], &mut want);
            assert_eq!(got, want, "{n} numbers");
        }
        let (low, high) = x.split_at(100);
        let (mut got, mut want) = (vec![Pair(0); 100], vec![Pair(0); 100]);
        zip_rows(low, high, &mut got);
        zip_each(low, high, &mut want);
        assert_eq!(got, want);
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        for (x, want) in [
            (1.0f32, 0x3f80),
            (1.0 + 1.0 / 256.0, 0x3f80),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (-0.0, 0x8000),
            (f32::MAX, 0x7f80),
            (-1e-39, 0x8000),
        ] {
            assert_eq!(round(x), want, "{x}");
        }
        assert!(widen(round(f32::NAN)).is_nan());
        assert_eq!(widen(round(f32::INFINITY)), f32::INFINITY);
    }
}
