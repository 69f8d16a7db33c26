//! Matrix products: their tiles, and how threads share them.

use super::pack::{self, Element, Lane};
use super::packed::{Packed, Panels, Part};
use super::panel::{Fetch, MR, NR, Out, Tile, panel_rows, rows_written};
use super::view::View;
use crate::shared::Shared;
use crate::team::{self, for_each};

/// Depth of a block of the summed index: panels of this depth fit the second-level cache.
const KC: usize = 1024;
/// Row panels that a task multiplies with one column panel before it goes on to the next.
const PANELS_PER_TASK: usize = 4;

/// Elements of the left-hand side up to which one thread packs it.
fn serial_packing_max() -> usize {
    if team::in_team() { 2 * 1024 } else { 64 * 1024 }
}

/// Computes `c = a · b`, or, if `add` is set, `c += a · b`, which continues each element's chain of additions.
///
/// # Panics
/// If the shapes do not match.
pub fn gemm<E: Element>(a: View<'_, E>, b: &Packed, c: &mut [f32], add: bool) {
    assert_eq!(c.len(), a.rows * b.cols, "size of the product");
    // SAFETY: `c` has all elements of the product, and is borrowed mutably.
    unsafe { product(a, b.into(), Shared::new(c), b.cols, add, true) };
}

/// [`gemm`] on the calling thread only, into columns of a wider matrix: element `(i, j)` of the product is
/// `c[i * stride + j]`.
pub fn gemm_serial<'b, E: Element>(a: View<'_, E>, b: impl Into<Part<'b>>, c: &mut [f32], stride: usize, add: bool) {
    let b = b.into();
    assert!(a.rows == 0 || b.cols == 0 || (a.rows - 1) * stride + b.cols <= c.len(), "room for the product");
    assert!(b.cols <= stride, "rows of the product overlap");
    // SAFETY: just checked; `c` is borrowed mutably.
    unsafe { product(a, b, Shared::new(c), stride, add, false) };
}

/// [`gemm_serial`] into a buffer of which other tasks write other parts.
///
/// # Safety
/// Elements `i * stride + j` of `c`, for every row `i` and column `j` of the product, exist and belong to the caller
/// until this returns.
pub unsafe fn gemm_shared<'b, E: Element>(
    a: View<'_, E>,
    b: impl Into<Part<'b>>,
    c: Shared<'_>,
    stride: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe { product(a, b.into(), c, stride, add, false) };
}

/// # Safety
/// As for [`gemm_shared`].
unsafe fn product<E: Element>(a: View<'_, E>, b: Part<'_>, c: Shared<'_>, stride: usize, add: bool, parallel: bool) {
    assert_eq!(a.cols, b.depth, "depth of the product");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    if a.cols == 0 {
        if !add {
            for i in 0..a.rows {
                // SAFETY: the caller's promise.
                unsafe { c.slice(i * stride, b.cols) }.fill(0.0);
            }
        }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe {
        match &b.packed.panels {
            Panels::F32(panels) => tiles(a, panels, b, c, stride, add, parallel),
            Panels::Bf16(panels) => tiles(a, panels, b, c, stride, add, parallel),
        }
    }
}

/// # Safety
/// As for [`gemm_shared`].
unsafe fn tiles<E: Element, L: Lane>(
    a: View<'_, E>,
    panels_of_b: &[L],
    b: Part<'_>,
    out: Shared<'_>,
    stride: usize,
    add: bool,
    parallel: bool,
) {
    let row_panels = a.rows.div_ceil(MR);
    let row_tasks = row_panels.div_ceil(PANELS_PER_TASK);
    let panels = b.cols.div_ceil(NR);
    // With few rows the columns are split too, so that all threads have work.
    let column_tasks = if parallel { (32 / row_tasks).clamp(1, panels) } else { 1 };
    let panels_per_task = panels.div_ceil(column_tasks);
    let panel_size = NR * b.packed.depth.div_ceil(L::STEPS);

    L::with_scratch(|packed_a| {
        for start in (0..a.cols).step_by(KC) {
            let k = start..(start + KC).min(a.cols);
            pack::rows(a, k.clone(), packed_a, parallel && a.rows * k.len() > serial_packing_max());
            let lanes = k.len().div_ceil(L::STEPS);
            let first_lane = start / L::STEPS;
            let continues = add || start > 0;
            let packed_a = &*packed_a;
            let work = |task: usize| {
                let (rows, columns) = (task / column_tasks, task % column_tasks);
                let row_panels = rows * PANELS_PER_TASK..((rows + 1) * PANELS_PER_TASK).min(row_panels);
                let column_panels = columns * panels_per_task..((columns + 1) * panels_per_task).min(panels);
                for column_panel in column_panels {
                    let at = column_panel * panel_size + first_lane * NR;
                    let b_panel = &panels_of_b[at..at + lanes * NR];
                    for row_panel in row_panels.clone() {
                        let a_panel = &packed_a[row_panel * MR * lanes..(row_panel + 1) * MR * lanes];
                        let rows = panel_rows(a.rows, row_panel);
                        // Each of these tiles prefetches its share of the next column panel.
                        let (part, parts) = (row_panel - row_panels.start, row_panels.len());
                        let fetch = Fetch { from: panel_size + part * lanes * NR / parts, step: NR / parts };
                        let place = Place {
                            row: rows.start,
                            rows: rows.len(),
                            fetch,
                            column: column_panel * NR,
                            columns: NR.min(b.cols - column_panel * NR),
                            stride,
                        };
                        // SAFETY: the caller's promise, and no other task computes this tile.
                        unsafe { place.run(out, a_panel, b_panel, continues) };
                    }
                }
            };
            let tasks = row_tasks * column_tasks;
            if parallel {
                for_each(tasks, work);
            } else {
                (0..tasks).for_each(work);
            }
        }
    });
}

/// Where a tile is in the result.
struct Place {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
    stride: usize,
    fetch: Fetch,
}

impl Place {
    /// # Safety
    /// The tile is inside `out`, and nothing else accesses it during the call.
    unsafe fn run<L: Lane>(&self, out: Shared<'_>, a: &[L], b: &[L], add: bool) {
        // SAFETY: the caller's promise.
        let row = |i: usize| unsafe { out.slice((self.row + i) * self.stride + self.column, self.columns) };
        if self.columns == NR && rows_written(self.rows) == self.rows {
            let out = Out { start: row(0).as_mut_ptr(), stride: self.stride, add, fetch: self.fetch };
            let _last = row(self.rows - 1); // panics if outside the buffer
            // SAFETY: all rows of the tile are in the result, and the caller has exclusive access.
            return unsafe { L::accumulate(self.rows, a, b, out) };
        }
        let mut tile: Tile = [0.0; MR * NR];
        if add {
            for (i, tile) in tile.as_chunks_mut::<NR>().0[..self.rows].iter_mut().enumerate() {
                tile[..self.columns].copy_from_slice(row(i));
            }
        }
        // SAFETY: a whole tile.
        unsafe { L::accumulate(self.rows, a, b, Out::tile(&mut tile, add)) };
        for (i, tile) in tile.as_chunks::<NR>().0[..self.rows].iter().enumerate() {
            row(i).copy_from_slice(&tile[..self.columns]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::{Precision, round_bf16, widen_bf16};
    use crate::random::Stream;

    fn random(n: usize, id: u64) -> Vec<f32> {
        let stream = Stream::new(7, id);
        (0..n as u64).map(|i| stream.uniform(i) as f32 - 0.5).collect()
    }

    /// One chain per element: the definition itself.
    fn naive(a: View<'_>, b: View<'_>, c: &mut [f32]) {
        for i in 0..a.rows {
            for j in 0..b.cols {
                for k in 0..a.cols {
                    let x = a.data[i * a.row_stride + k * a.col_stride];
                    let y = b.data[k * b.row_stride + j * b.col_stride];
                    c[i * b.cols + j] = x.mul_add(y, c[i * b.cols + j]);
                }
            }
        }
    }

    #[test]
    fn every_shape_and_layout_is_bitwise_the_naive_chain() {
        for (m, n, k) in
            [(1, 1, 1), (1, 33, 7), (12, 32, 16), (13, 65, 40), (50, 96, 1100), (3, 200, 2500), (0, 4, 4), (4, 4, 0)]
        {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let va = if ta { View::new(&a, k, m).t() } else { View::new(&a, m, k) };
                let vb = if tb { View::new(&b, n, k).t() } else { View::new(&b, k, n) };
                for add in [false, true] {
                    let start = if add { random(m * n, 3) } else { vec![0.0; m * n] };
                    let mut want = start.clone();
                    naive(va, vb, &mut want);
                    let mut got = if add { start } else { vec![f32::NAN; m * n] };
                    gemm(va, &Packed::new(vb, Precision::F32), &mut got, add);
                    assert_eq!(got, want, "{m}x{n}x{k} {ta} {tb} {add}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours_or_the_thread_count() {
        let (m, n, k) = (37, 100, 300);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let packed = Packed::new(View::new(&b, k, n), Precision::F32);
        let mut all = vec![0.0; m * n];
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        one.install(|| gemm(View::new(&a, m, k), &packed, &mut all, false));
        for r in 0..m {
            let mut row = vec![0.0; n];
            gemm(View::new(&a[r * k..(r + 1) * k], 1, k), &packed, &mut row, false);
            assert_eq!(row, all[r * n..(r + 1) * n]);
        }
    }

    #[test]
    fn concatenated_parts_are_one_matrix() {
        let (a, b, c) = (random(20 * 9, 1), random(9 * 40, 2), random(9 * 7, 3));
        let packed = Packed::concat(&[View::new(&b, 9, 40), View::new(&c, 9, 7)], Precision::F32);
        let mut got = vec![0.0; 20 * 47];
        gemm(View::new(&a, 20, 9), &packed, &mut got, false);
        let (mut left, mut right) = (vec![0.0; 20 * 40], vec![0.0; 20 * 7]);
        naive(View::new(&a, 20, 9), View::new(&b, 9, 40), &mut left);
        naive(View::new(&a, 20, 9), View::new(&c, 9, 7), &mut right);
        for r in 0..20 {
            assert_eq!(got[r * 47..r * 47 + 40], left[r * 40..(r + 1) * 40]);
            assert_eq!(got[r * 47 + 40..(r + 1) * 47], right[r * 7..(r + 1) * 7]);
        }
    }

    #[test]
    fn bfloat16_products_are_those_of_rounded_factors_for_any_shape_batch_and_layout() {
        let rounded = |x: &[f32]| x.iter().map(|&x| widen_bf16(round_bf16(x))).collect::<Vec<_>>();
        for (m, n, k) in [(1, 1, 1), (12, 32, 16), (13, 65, 41), (50, 96, 1101), (3, 200, 2500), (4, 4, 0)] {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let (ra, rb) = (rounded(&a), rounded(&b));
            let mut want = vec![0.0; m * n];
            naive(View::new(&ra, m, k), View::new(&rb, k, n), &mut want);
            let mut rows = vec![0.0; m * n];
            let packed = Packed::new(View::new(&b, k, n), Precision::Bf16);
            for r in 0..m {
                gemm_serial(View::new(&a[r * k..(r + 1) * k], 1, k), &packed, &mut rows[r * n..(r + 1) * n], n, false);
            }
            for (got, want) in rows.iter().zip(&want) {
                assert!((got - want).abs() <= 1e-4 * (k as f32).sqrt(), "{m}x{n}x{k}: {got} {want}");
            }
            // Other layouts, a bfloat16 source, all rows at once: the same bits.
            let (at, bt): (Vec<f32>, Vec<half::bf16>) = (
                (0..m * k).map(|i| a[i % m * k + i / m]).collect(),
                (0..k * n).map(|i| half::bf16::from_f32(b[i % k.max(1) * n + i / k.max(1)])).collect(),
            );
            let packed = Packed::new(View::new(&bt, n, k).t(), Precision::Bf16);
            let mut all = vec![0.0; m * n];
            gemm(View::new(&at, k, m).t(), &packed, &mut all, false);
            assert_eq!(all, rows, "{m}x{n}x{k}");
        }
    }

    #[test]
    fn columns_of_a_view_are_a_matrix_of_their_own() {
        let (a, b) = (random(20 * 9, 1), random(4 * 6, 2));
        let mut got = vec![0.0; 20 * 6];
        gemm(View::new(&a, 20, 9).columns(3..7), &Packed::new(View::new(&b, 4, 6), Precision::F32), &mut got, false);
        let part: Vec<f32> = a.chunks(9).flat_map(|r| r[3..7].to_vec()).collect();
        let mut want = vec![0.0; 20 * 6];
        naive(View::new(&part, 20, 4), View::new(&b, 4, 6), &mut want);
        assert_eq!(got, want);
    }
}
