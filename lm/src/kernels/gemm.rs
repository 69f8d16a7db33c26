//! Matrix products `C[m,n] = Σ_k A[m,k] B[k,n]`, f32, row-major results.
//!
//! Operands are read through strides and packed into panels; a result is the same bits for any number of
//! rows, columns or threads (see [the rules](super)). A [`Packed`] right-hand side can be kept and reused.

use rayon::prelude::*;

use super::microkernel::{MR, NR, Tile, accumulate};

/// Depth of a packed block: panels of this many `k` stay in the second-level cache.
const KC: usize = 1024;
/// Row panels that a task runs against one column panel before it fetches the next.
const PANELS_PER_TASK: usize = 4;

/// A matrix seen through strides: element `(r, c)` is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major `rows` × `cols` matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows}x{cols} view");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose of this view.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// A right-hand side in panels of a fixed number of columns, read in blocks of depth.
pub struct Packed {
    data: Vec<f32>,
    depth: usize,
    cols: usize,
}

impl Packed {
    /// Packs one matrix of shape `[k, n]`.
    pub fn new(b: View<'_>) -> Self {
        Self::concat(&[b])
    }

    /// Packs matrices of equal depth side by side, as if they were one of all their columns.
    pub fn concat(parts: &[View<'_>]) -> Self {
        let depth = parts.first().map_or(0, |p| p.rows);
        assert!(parts.iter().all(|p| p.rows == depth), "parts of unequal depth");
        let cols: usize = parts.iter().map(|p| p.cols).sum();
        let panels = cols.div_ceil(NR);
        let mut data = vec![0.0; panels * NR * depth];
        // Panels are contiguous over all of the depth, so a block of depth is a sub-slice of its panel.
        data.par_chunks_mut((NR * depth).max(1)).enumerate().for_each(|(p, panel)| {
            let first = p * NR;
            let mut offset = 0;
            for part in parts {
                let (from, to) = (first.max(offset), (first + NR).min(offset + part.cols));
                if from < to {
                    pack_columns(part, from - offset..to - offset, panel, from - first);
                }
                offset += part.cols;
            }
        });
        Self { data, depth, cols }
    }

    /// Columns of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Length of the summed index.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    fn panel(&self, p: usize, k: std::ops::Range<usize>) -> &[f32] {
        let start = p * NR * self.depth;
        &self.data[start + k.start * NR..start + k.end * NR]
    }
}

/// Writes columns of `part` into a `[depth][NR]` panel, from column `at` of the panel on.
fn pack_columns(part: &View<'_>, columns: std::ops::Range<usize>, panel: &mut [f32], at: usize) {
    if part.col_stride == 1 {
        for (k, row) in panel.chunks_exact_mut(NR).enumerate() {
            let source = k * part.row_stride;
            row[at..at + columns.len()].copy_from_slice(&part.data[source + columns.start..source + columns.end]);
        }
    } else {
        // A transposed matrix: read each of its rows in order, in blocks that stay in the first-level cache.
        const BLOCK: usize = 16;
        for (block, rows) in panel.chunks_mut(NR * BLOCK).enumerate() {
            for (i, j) in columns.clone().enumerate() {
                let source = j * part.col_stride + block * BLOCK * part.row_stride;
                for (k, row) in rows.chunks_exact_mut(NR).enumerate() {
                    row[at + i] = part.data[source + k * part.row_stride];
                }
            }
        }
    }
}

/// Packs rows of `a`, for the given range of `k`, into panels of `MR` rows.
fn pack_rows(a: View<'_>, k: std::ops::Range<usize>) -> Vec<f32> {
    let depth = k.len();
    let mut packed = vec![0.0; a.rows.div_ceil(MR) * MR * depth];
    packed.par_chunks_mut((MR * depth).max(1)).enumerate().for_each(|(p, panel)| {
        let rows = p * MR..((p + 1) * MR).min(a.rows);
        if a.col_stride == 1 {
            for (i, r) in rows.enumerate() {
                let row = &a.data[r * a.row_stride + k.start..r * a.row_stride + k.end];
                for (column, &x) in panel.chunks_exact_mut(MR).zip(row) {
                    column[i] = x;
                }
            }
        } else {
            for (step, column) in panel.chunks_exact_mut(MR).enumerate() {
                let source = (k.start + step) * a.col_stride;
                for (i, r) in rows.clone().enumerate() {
                    column[i] = a.data[source + r * a.row_stride];
                }
            }
        }
    });
    packed
}

/// A pointer to the result that tasks share; each writes its own columns of its own rows.
#[derive(Clone, Copy)]
struct Output(*mut f32);
// SAFETY: tasks write disjoint elements and nobody reads before all have ended.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// `c = a · b`, or `c += a · b` when `add` is set, which continues each element's chain where it stands.
///
/// # Panics
/// When the shapes do not fit; callers check shapes at their own boundary.
pub fn gemm(a: View<'_>, b: &Packed, c: &mut [f32], add: bool) {
    assert_eq!(a.cols, b.depth, "depth of the product");
    assert_eq!(c.len(), a.rows * b.cols, "size of the product");
    if c.is_empty() {
        return;
    }
    if a.cols == 0 {
        if !add {
            c.fill(0.0);
        }
        return;
    }
    let row_tasks = a.rows.div_ceil(MR).div_ceil(PANELS_PER_TASK);
    let panels = b.cols.div_ceil(NR);
    // Few rows: split the columns, so that all threads have work. Many: whole rows of tiles to each.
    let column_tasks = (32 / row_tasks).clamp(1, panels);
    let panels_per_task = panels.div_ceil(column_tasks);
    let out = Output(c.as_mut_ptr());

    for start in (0..a.cols).step_by(KC) {
        let k = start..(start + KC).min(a.cols);
        let packed_a = pack_rows(a, k.clone());
        let continues = add || start > 0;
        let work = |task: usize| {
            let (rows, columns) = (task / column_tasks, task % column_tasks);
            let row_panels = rows * PANELS_PER_TASK..((rows + 1) * PANELS_PER_TASK).min(a.rows.div_ceil(MR));
            let column_panels = columns * panels_per_task..((columns + 1) * panels_per_task).min(panels);
            for column_panel in column_panels {
                let b_panel = b.panel(column_panel, k.clone());
                for row_panel in row_panels.clone() {
                    let a_panel = &packed_a[row_panel * MR * k.len()..(row_panel + 1) * MR * k.len()];
                    let place = Place {
                        row: row_panel * MR,
                        rows: MR.min(a.rows - row_panel * MR),
                        column: column_panel * NR,
                        columns: NR.min(b.cols - column_panel * NR),
                        stride: b.cols,
                    };
                    // SAFETY: `place` lies inside `c`, and no other task has this tile.
                    unsafe { place.run(out, a_panel, b_panel, continues) };
                }
            }
        };
        let tasks = row_tasks * column_tasks;
        if tasks == 1 {
            work(0);
        } else {
            (0..tasks).into_par_iter().for_each(work);
        }
    }
}

/// Where a tile lies in the result.
struct Place {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
    stride: usize,
}

impl Place {
    /// # Safety
    /// The tile lies inside `out`, and nothing else touches it meanwhile.
    unsafe fn run(&self, out: Output, a: &[f32], b: &[f32], continues: bool) {
        let mut tile: Tile = [0.0; MR * NR];
        let row = |i: usize| {
            // SAFETY: the caller's promise; rows of one tile do not overlap.
            unsafe {
                std::slice::from_raw_parts_mut(out.0.add((self.row + i) * self.stride + self.column), self.columns)
            }
        };
        if continues {
            for i in 0..self.rows {
                tile[i * NR..i * NR + self.columns].copy_from_slice(row(i));
            }
        }
        accumulate(self.rows, a, b, &mut tile);
        for i in 0..self.rows {
            row(i).copy_from_slice(&tile[i * NR..i * NR + self.columns]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
                    gemm(va, &Packed::new(vb), &mut got, add);
                    assert_eq!(got, want, "{m}x{n}x{k} {ta} {tb} {add}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours_or_the_thread_count() {
        let (m, n, k) = (37, 100, 300);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let packed = Packed::new(View::new(&b, k, n));
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
        let packed = Packed::concat(&[View::new(&b, 9, 40), View::new(&c, 9, 7)]);
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
}
