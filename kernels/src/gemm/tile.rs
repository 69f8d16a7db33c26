//! The innermost loops of an f32 product: one tile, kept in registers.

use super::panel::{MR, NR, Out};
use crate::isa::Isa;

/// Adds the products of two packed panels, in the order of `k`, for the first `rows` rows of a tile.
///
/// For each of the same number of `k`, `a` has `MR` elements and `b` has `NR`.
///
/// # Safety
/// [`rows_written`](super::panel::rows_written) rows of [`NR`] columns exist at `out`, and the caller has exclusive access.
pub unsafe fn accumulate(rows: usize, a: &[f32], b: &[f32], out: Out) {
    assert!(rows <= MR && a.len() / MR == b.len() / NR, "panels of unequal depth");
    // SAFETY: `detect` returns an instruction set this machine has; the panels are equally deep; the caller's promise.
    unsafe {
        match Isa::detect() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => x86::avx512(rows, a, b, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => x86::avx2(rows, a, b, out),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::f32_tile(rows, a, b, out),
            _ => portable(rows, a, b, out),
        }
    }
}

/// # Safety
/// As for [`accumulate`].
unsafe fn portable(rows: usize, a: &[f32], b: &[f32], out: Out) {
    for i in 0..rows {
        // SAFETY: the caller's promise.
        let row = unsafe { &mut *out.start.add(i * out.stride).cast::<[f32; NR]>() };
        if !out.add {
            row.fill(0.0);
        }
        for (a, b) in a.as_chunks::<MR>().0.iter().zip(b.as_chunks::<NR>().0) {
            for j in 0..NR {
                row[j] = a[i].mul_add(b[j], row[j]);
            }
        }
    }
}

/// Defines a kernel for AVX-512, `$name(rows, a, b, out)`, over panels of `$lane`. `$load` loads a vector of the right-hand
/// side, `$spread` broadcasts an element of the left-hand side, and `$step` adds their products to a vector of sums.
#[cfg(target_arch = "x86_64")]
macro_rules! avx512_kernel {
    ($name:ident, $features:literal, $lane:ty, |$b:ident| $load:expr, |$a:ident| $spread:expr,
     |$x:ident, $y:ident, $sum:ident| $step:expr) => {
        /// # Safety
        /// The machine has the features; `a` and `b` are equally deep panels; `tile::accumulate`'s rule for `out`.
        #[target_feature(enable = $features)]
        pub unsafe fn $name(rows: usize, a: &[$lane], b: &[$lane], out: Out) {
            // SAFETY: the caller's promise is passed on.
            unsafe {
                match rows {
                    0 => {}
                    1 => some_rows::<1>(a, b, out),
                    2 => some_rows::<2>(a, b, out),
                    3 => some_rows::<3>(a, b, out),
                    4 => some_rows::<4>(a, b, out),
                    5 | 6 => some_rows::<6>(a, b, out),
                    7 | 8 => some_rows::<8>(a, b, out),
                    _ => some_rows::<MR>(a, b, out),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn some_rows<const R: usize>(a: &[$lane], b: &[$lane], out: Out) {
            let depth = a.len() / MR;
            // SAFETY: `a` has `depth * MR` and `b` has `depth * NR` elements, `out` has R <= MR rows of `NR`.
            unsafe {
                let mut c = [[_mm512_setzero_ps(); 2]; R];
                if out.add {
                    for (i, row) in c.iter_mut().enumerate() {
                        row[0] = _mm512_loadu_ps(out.start.add(i * out.stride));
                        row[1] = _mm512_loadu_ps(out.start.add(i * out.stride + 16));
                    }
                }
                let (mut pa, mut pb) = (a.as_ptr(), b.as_ptr());
                let mut ahead = out.fetch.ahead_of(pb);
                for _ in 0..depth {
                    ahead.go_on();
                    let $b = pb;
                    let first = $load;
                    let $b = pb.add(16);
                    let second = $load;
                    for (i, row) in c.iter_mut().enumerate() {
                        let $a = pa.add(i);
                        let $x = $spread;
                        let ($y, $sum) = (first, row[0]);
                        row[0] = $step;
                        let ($y, $sum) = (second, row[1]);
                        row[1] = $step;
                    }
                    pa = pa.add(MR);
                    pb = pb.add(NR);
                }
                for (i, row) in c.iter().enumerate() {
                    _mm512_storeu_ps(out.start.add(i * out.stride), row[0]);
                    _mm512_storeu_ps(out.start.add(i * out.stride + 16), row[1]);
                }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512_kernel;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use crate::gemm::panel::{MR, NR, Out};
    use std::arch::x86_64::*;

    avx512_kernel!(
        avx512,
        "avx512f",
        f32,
        |b| _mm512_loadu_ps(b),
        |a| _mm512_set1_ps(*a),
        |x, b, sum| _mm512_fmadd_ps(x, b, sum)
    );

    /// # Safety
    /// The machine has AVX2 and FMA; `a` and `b` are equally deep panels.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(rows: usize, a: &[f32], b: &[f32], out: Out) {
        // SAFETY: the caller's promise; no row past `rows` is touched.
        unsafe {
            for first in (0..rows).step_by(3) {
                match rows - first {
                    1 => avx2_rows::<1>(first, a, b, out),
                    2 => avx2_rows::<2>(first, a, b, out),
                    _ => avx2_rows::<3>(first, a, b, out),
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_rows<const R: usize>(first: usize, a: &[f32], b: &[f32], out: Out) {
        let depth = a.len() / MR;
        // SAFETY: as in `avx512_kernel`, for the rows `first .. first + R`.
        unsafe {
            let start = out.start.add(first * out.stride);
            let mut c = [[_mm256_setzero_ps(); 4]; R];
            if out.add {
                for (i, row) in c.iter_mut().enumerate() {
                    for (j, x) in row.iter_mut().enumerate() {
                        *x = _mm256_loadu_ps(start.add(i * out.stride + 8 * j));
                    }
                }
            }
            let (mut pa, mut pb) = (a.as_ptr().add(first), b.as_ptr());
            let mut ahead = out.fetch.ahead_of(pb);
            for _ in 0..depth {
                ahead.go_on();
                let x: [__m256; R] = std::array::from_fn(|i| _mm256_set1_ps(*pa.add(i)));
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
                    _mm256_storeu_ps(start.add(i * out.stride + 8 * j), x);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::panel::Tile;

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
        for (rows, add) in (1..=MR).flat_map(|rows| [(rows, false), (rows, true)]) {
            let run = |kernel: unsafe fn(usize, &[f32], &[f32], Out)| {
                let mut tile = start;
                // SAFETY: a whole tile; instruction sets are asked for below.
                unsafe { kernel(rows, &a, &b, Out::tile(&mut tile, add)) };
                tile[..rows * NR].to_vec()
            };
            let want = run(portable);
            assert_eq!(run(accumulate), want, "{rows} rows");
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                assert_eq!(run(x86::avx2), want, "{rows} rows, AVX2");
            }
        }
    }
}
