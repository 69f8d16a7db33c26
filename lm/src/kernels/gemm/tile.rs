//! The innermost tile of a matrix product: up to [`MR`] rows by [`NR`] columns, kept in registers.
//!
//! Panels are packed with the summed index outermost: `a[k * MR + i]`, `b[k * NR + j]`.

use crate::kernels::Isa;

/// Rows of a tile.
pub const MR: usize = 12;
/// Columns of a tile.
pub const NR: usize = 32;

/// An accumulator tile, row-major.
pub type Tile = [f32; MR * NR];

/// Continues the first `rows` rows of `tile` by the products of two packed panels, in the order of `k`.
///
/// `a` holds `MR` and `b` holds `NR` elements for each of the same number of `k`.
pub fn accumulate(rows: usize, a: &[f32], b: &[f32], tile: &mut Tile) {
    assert!(rows <= MR && a.len() / MR == b.len() / NR, "panels of unequal depth");
    match Isa::detect() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `detect` returns an instruction set this machine has; the panels are equally deep.
        Isa::Avx512 => unsafe { x86::avx512(rows, a, b, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::avx2(rows, a, b, tile) },
        _ => portable(rows, a, b, tile),
    }
}

fn portable(rows: usize, a: &[f32], b: &[f32], tile: &mut Tile) {
    for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
        for (row, &x) in tile.as_chunks_mut::<NR>().0.iter_mut().zip(a).take(rows) {
            for j in 0..NR {
                row[j] = x.mul_add(b[j], row[j]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{MR, NR, Tile};
    use std::arch::x86_64::*;

    /// Elements of the right-hand panel between its loads and its prefetches.
    const AHEAD: usize = 16 * NR;

    /// # Safety
    /// The machine has AVX-512F; `a` and `b` are equally deep panels.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(rows: usize, a: &[f32], b: &[f32], tile: &mut Tile) {
        // SAFETY: the caller's promise is passed on.
        unsafe {
            match rows {
                0 => {}
                1 => avx512_rows::<1>(a, b, tile),
                2 => avx512_rows::<2>(a, b, tile),
                3 => avx512_rows::<3>(a, b, tile),
                4 => avx512_rows::<4>(a, b, tile),
                5 | 6 => avx512_rows::<6>(a, b, tile),
                7 | 8 => avx512_rows::<8>(a, b, tile),
                _ => avx512_rows::<MR>(a, b, tile),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn avx512_rows<const R: usize>(a: &[f32], b: &[f32], tile: &mut Tile) {
        let depth = a.len() / MR;
        // SAFETY: `a` has `depth * MR` and `b` has `depth * NR` elements, `tile` has `MR * NR`, R <= MR.
        unsafe {
            let t = tile.as_mut_ptr();
            let mut c = [[_mm512_setzero_ps(); 2]; R];
            for (i, row) in c.iter_mut().enumerate() {
                row[0] = _mm512_loadu_ps(t.add(i * NR));
                row[1] = _mm512_loadu_ps(t.add(i * NR + 16));
            }
            let (mut pa, mut pb) = (a.as_ptr(), b.as_ptr());
            for _ in 0..depth {
                _mm_prefetch::<_MM_HINT_T0>(pb.wrapping_add(AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(pb.wrapping_add(AHEAD + 16).cast());
                let b0 = _mm512_loadu_ps(pb);
                let b1 = _mm512_loadu_ps(pb.add(16));
                for (i, row) in c.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*pa.add(i));
                    row[0] = _mm512_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm512_fmadd_ps(x, b1, row[1]);
                }
                pa = pa.add(MR);
                pb = pb.add(NR);
            }
            for (i, row) in c.iter().enumerate() {
                _mm512_storeu_ps(t.add(i * NR), row[0]);
                _mm512_storeu_ps(t.add(i * NR + 16), row[1]);
            }
        }
    }

    /// # Safety
    /// The machine has AVX2 and FMA; `a` and `b` are equally deep panels.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(rows: usize, a: &[f32], b: &[f32], tile: &mut Tile) {
        for first in (0..rows).step_by(3) {
            // SAFETY: the caller's promise, and `first + 3 <= MR` because 3 divides MR.
            unsafe { avx2_three_rows(first, a, b, tile) }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_three_rows(first: usize, a: &[f32], b: &[f32], tile: &mut Tile) {
        let depth = a.len() / MR;
        // SAFETY: as in `avx512_rows`, for the rows `first .. first + 3`.
        unsafe {
            let t = tile.as_mut_ptr().add(first * NR);
            let mut c = [[_mm256_setzero_ps(); 4]; 3];
            for (i, row) in c.iter_mut().enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = _mm256_loadu_ps(t.add(i * NR + 8 * j));
                }
            }
            let (mut pa, mut pb) = (a.as_ptr().add(first), b.as_ptr());
            for _ in 0..depth {
                let x: [__m256; 3] = [0, 1, 2].map(|i| _mm256_set1_ps(*pa.add(i)));
                for j in 0..4 {
                    let y = _mm256_loadu_ps(pb.add(8 * j));
                    for (row, &x) in c.iter_mut().zip(&x) {
                        row[j] = _mm256_fmadd_ps(x, y, row[j]);
                    }
                }
                pa = pa.wrapping_add(MR);
                pb = pb.add(NR);
            }
            for (i, row) in c.iter().enumerate() {
                for (j, &x) in row.iter().enumerate() {
                    _mm256_storeu_ps(t.add(i * NR + 8 * j), x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(width: usize, depth: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..width * depth)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let (a, b) = (panel(MR, 77, 1), panel(NR, 77, 2));
        let start: Tile = panel(MR, NR, 3).try_into().unwrap();
        for rows in 1..=MR {
            let mut want = start;
            portable(rows, &a, &b, &mut want);
            let mut got = start;
            accumulate(rows, &a, &b, &mut got);
            assert_eq!(got[..rows * NR], want[..rows * NR], "{rows} rows");
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                let mut got = start;
                // SAFETY: the features were just detected.
                unsafe { x86::avx2(rows, &a, &b, &mut got) };
                assert_eq!(got[..rows * NR], want[..rows * NR], "{rows} rows, AVX2");
            }
        }
    }
}
