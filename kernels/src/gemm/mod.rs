//! Matrix products `C[m,n] = Σ_k A[m,k] B[k,n]`, with f32 sums and row-major results.
//!
//! Operands are read through strides and packed into panels, in f32 or rounded to bfloat16; a result is the same
//! bits for any number of rows, columns or threads (see [the rules](super)). A [`Packed`] right-hand side can be
//! kept and reused, and says in which precision the product runs.

mod bf16;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod tile;

pub use bf16::{round as round_bf16, round_row, widen as widen_bf16};
pub use pack::Element;

use super::Shared;
use super::team::{self, for_each, for_each_chunk};
use bf16::Pair;
use pack::Lane;
use tile::{Fetch, MR, NR, Out, Tile, panel_rows, rows_written};

/// Depth of a packed block: panels of this many `k` stay in the second-level cache.
const KC: usize = 1024;
/// Row panels that a task runs against one column panel before it fetches the next.
const PANELS_PER_TASK: usize = 4;

/// Elements of the left-hand side up to which packing it is not worth sharing.
fn packing_worth_sharing() -> usize {
    if team::is_awake() { 2 * 1024 } else { 64 * 1024 }
}

/// What the factors of a product are rounded to; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// To the nearest bfloat16.
    Bf16,
}

impl Precision {
    /// What weights that are only read are stored as.
    pub fn dtype(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
        }
    }
}

/// A matrix seen through strides: element `(r, c)` is `data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a, E = f32> {
    data: &'a [E],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, E: Element> View<'a, E> {
    /// A row-major `rows` × `cols` matrix.
    pub fn new(data: &'a [E], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows}x{cols} view");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The transpose of this view.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// Some of the rows of a row-major view.
    pub fn rows(self, range: std::ops::Range<usize>) -> Self {
        assert!(self.col_stride == 1 && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let end = if range.is_empty() { 0 } else { (range.end - 1) * self.row_stride + self.cols };
        Self { data: &self.data[(range.start * self.row_stride).min(end)..end], rows: range.len(), ..self }
    }

    /// Some of the columns of a row-major view.
    pub fn columns(self, range: std::ops::Range<usize>) -> Self {
        assert!(self.col_stride == 1 && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let end = if self.rows == 0 { 0 } else { (self.rows - 1) * self.row_stride + range.end };
        Self { data: &self.data[range.start.min(end)..end], cols: range.len(), ..self }
    }

    /// A row of a row-major view.
    pub fn row(&self, row: usize) -> &'a [E] {
        assert!(self.col_stride == 1 && row < self.rows, "row {row} of {}", self.rows);
        &self.data[row * self.row_stride..row * self.row_stride + self.cols]
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

/// A right-hand side in panels of a fixed number of columns, read in blocks of depth.
pub struct Packed {
    panels: Panels,
    depth: usize,
    cols: usize,
}

enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<Pair>),
}

impl Packed {
    /// Packs one matrix of shape `[k, n]`.
    pub fn new<E: Element>(b: View<'_, E>, precision: Precision) -> Self {
        Self::concat(&[b], precision)
    }

    /// Packs matrices of equal depth side by side, as if they were one of all their columns.
    pub fn concat<E: Element>(parts: &[View<'_, E>], precision: Precision) -> Self {
        let mut packed = Self::empty(precision);
        packed.fill(parts, true);
        packed
    }

    /// Nothing yet; [`Packed::fill`] packs into it.
    pub fn empty(precision: Precision) -> Self {
        let panels = match precision {
            Precision::F32 => Panels::F32(Vec::new()),
            Precision::Bf16 => Panels::Bf16(Vec::new()),
        };
        Self { panels, depth: 0, cols: 0 }
    }

    /// Packs matrices of equal depth side by side in place of what was there, in the same memory.
    pub fn fill<E: Element>(&mut self, parts: &[View<'_, E>], parallel: bool) {
        let depth = parts.first().map_or(0, |p| p.rows);
        assert!(parts.iter().all(|p| p.rows == depth), "parts of unequal depth");
        (self.depth, self.cols) = (depth, parts.iter().map(|p| p.cols).sum());
        match &mut self.panels {
            Panels::F32(data) => fill_panels(data, parts, depth, self.cols, parallel),
            Panels::Bf16(data) => fill_panels(data, parts, depth, self.cols, parallel),
        }
    }

    /// Columns of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Length of the summed index.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Precision of the factors.
    pub fn precision(&self) -> Precision {
        match self.panels {
            Panels::F32(_) => Precision::F32,
            Panels::Bf16(_) => Precision::Bf16,
        }
    }
}

/// Panels are contiguous over all of the depth, so a block of depth is a sub-slice of its panel.
fn fill_panels<E: Element, L: Lane>(
    data: &mut Vec<L>,
    parts: &[View<'_, E>],
    depth: usize,
    cols: usize,
    parallel: bool,
) {
    let size = NR * depth.div_ceil(L::STEPS);
    // Columns past the last keep what was there: their results are not used.
    data.resize(cols.div_ceil(NR) * size, L::default());
    let fill = |p: usize, panel: &mut [L]| {
        let first = p * NR;
        let mut offset = 0;
        for part in parts {
            let (from, to) = (first.max(offset), (first + NR).min(offset + part.cols));
            if from < to {
                pack::columns(part, from - offset..to - offset, panel, from - first);
            }
            offset += part.cols;
        }
    };
    if parallel {
        for_each_chunk(data, size, fill);
    } else {
        data.chunks_mut(size.max(1)).enumerate().for_each(|(p, panel)| fill(p, panel));
    }
}

/// The first rows and columns of a packed matrix.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    packed: &'a Packed,
    depth: usize,
    cols: usize,
}

impl Packed {
    /// The first `depth` rows of the first `cols` columns.
    pub fn leading(&self, depth: usize, cols: usize) -> Part<'_> {
        assert!(depth <= self.depth && cols <= self.cols, "{depth}x{cols} of {}x{}", self.depth, self.cols);
        Part { packed: self, depth, cols }
    }
}

impl<'a> From<&'a Packed> for Part<'a> {
    fn from(packed: &'a Packed) -> Self {
        packed.leading(packed.depth, packed.cols)
    }
}

/// `c = a · b`, or `c += a · b` when `add` is set, which continues each element's chain where it stands.
///
/// # Panics
/// When the shapes do not fit; callers check shapes at their own boundary.
pub fn gemm<E: Element>(a: View<'_, E>, b: &Packed, c: &mut [f32], add: bool) {
    assert_eq!(c.len(), a.rows * b.cols, "size of the product");
    // SAFETY: `c` has room for all rows, and is borrowed alone.
    unsafe { product(a, b.into(), Shared::new(c), b.cols, add, true) };
}

/// [`gemm`] on the calling thread alone, into the columns of a wider matrix: element `(i, j)` of the product
/// goes to `c[i * stride + j]`.
pub fn gemm_serial<'b, E: Element>(a: View<'_, E>, b: impl Into<Part<'b>>, c: &mut [f32], stride: usize, add: bool) {
    let b = b.into();
    assert!(a.rows == 0 || b.cols == 0 || (a.rows - 1) * stride + b.cols <= c.len(), "room for the product");
    assert!(b.cols <= stride, "rows of the product overlap");
    // SAFETY: just checked; `c` is borrowed alone.
    unsafe { product(a, b, Shared::new(c), stride, add, false) };
}

/// [`gemm_serial`] into a buffer that other tasks write other parts of.
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
    // Few rows: split the columns, so that all threads have work. Many: whole rows of tiles to each.
    let column_tasks = if parallel { (32 / row_tasks).clamp(1, panels) } else { 1 };
    let panels_per_task = panels.div_ceil(column_tasks);
    let panel_size = NR * b.packed.depth.div_ceil(L::STEPS);

    L::with_scratch(|packed_a| {
        for start in (0..a.cols).step_by(KC) {
            let k = start..(start + KC).min(a.cols);
            pack::rows(a, k.clone(), packed_a, parallel && a.rows * k.len() > packing_worth_sharing());
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
                        // Each of these tiles fetches its part of the panel that follows.
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
                        // SAFETY: the caller's promise, and no other task has this tile.
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

/// Where a tile lies in the result.
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
    /// The tile lies inside `out`, and nothing else touches it meanwhile.
    unsafe fn run<L: Lane>(&self, out: Shared<'_>, a: &[L], b: &[L], add: bool) {
        // SAFETY: the caller's promise.
        let row = |i: usize| unsafe { out.slice((self.row + i) * self.stride + self.column, self.columns) };
        if self.columns == NR && rows_written(self.rows) == self.rows {
            let out = Out { start: row(0).as_mut_ptr(), stride: self.stride, add, fetch: self.fetch };
            let _last = row(self.rows - 1); // inside the buffer, or this panics
            // SAFETY: all rows of the tile are in the result and belong to the caller.
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
