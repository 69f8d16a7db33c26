//! Rounding f32 to bfloat16, one by one and in pairs along the summed index.

use crate::isa::per_isa;

/// Two bfloat16 numbers that are neighbours along the summed index, the first in the low half.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pair(pub u32);

/// Rounds `x` to the nearest bfloat16, ties to even, and returns its bits. A NaN stays a NaN. A denormal becomes a zero of
/// the same sign, as in the AVX-512 instruction.
#[inline(always)]
pub fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let rounded = if x.is_nan() { (bits >> 16) | 0x40 } else { rounded };
    (if bits & 0x7f80_0000 == 0 { (bits >> 16) & 0x8000 } else { rounded }) as u16
}

/// The f32 of the same value as a bfloat16, given its bits.
#[inline(always)]
pub fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// [`round`]s each element of `x`.
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

/// `out[i]` is elements `2 i` and `2 i + 1` of `row`, rounded. If the last has no neighbour, its high half is zero.
pub fn pair_row(row: &[f32], out: &mut [Pair]) {
    #[cfg(target_arch = "x86_64")]
    if has_dot() {
        let whole = row.len() / 2;
        // SAFETY: the machine has AVX-512-BF16; a pair has the layout of two consecutive bfloat16 numbers.
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

/// Whether kernels use AVX-512-BF16.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_dot() -> bool {
    use crate::isa::Isa;
    static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *FOUND.get_or_init(|| Isa::detect() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16"))
}

/// The f32 of these bits, a denormal replaced by a zero of the same sign.
#[inline(always)]
pub(super) fn flushed(bits: u32) -> f32 {
    f32::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::gemm::bf16::{Pair, round};
    use std::arch::x86_64::*;

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
            // Mask of the elements that exist: sixteen, or what is left.
            let mask = u16::MAX >> (16 - (n - i).min(16));
            // SAFETY: the masked elements exist in all three slices.
            unsafe {
                let l = _mm512_maskz_loadu_ps(mask, low.as_ptr().add(i));
                let h = _mm512_maskz_loadu_ps(mask, high.as_ptr().add(i));
                let both = _mm512_or_si512(wide(l), _mm512_slli_epi32::<16>(wide(h)));
                _mm512_mask_storeu_epi32(out.as_mut_ptr().add(i).cast(), mask, both);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

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
