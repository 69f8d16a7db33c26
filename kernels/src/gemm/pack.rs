//! Packing factors into panels. The summed index is outermost, so that a tile reads both panels front to back.

use super::bf16::{Pair, round};
use super::panel::{MR, NR, Out, panel_rows};
use super::view::View;
use super::{bf16, bf16_tile, tile};
use crate::isa::{per_isa, prefetch};
use crate::team::{for_each_chunk, lend};

/// An element of a matrix: f32 or bfloat16.
pub trait Element: Copy + Send + Sync {
    /// The value.
    fn widen(self) -> f32;
    /// The nearest bfloat16.
    fn narrow(self) -> u16;
    /// `out[i]` is element `i` of `row`, as f32.
    fn copy(row: &[Self], out: &mut [f32]);
    /// `out[i]` is elements `2 i` and `2 i + 1` of `row`. If the last has no neighbour, its high half is zero.
    fn pair(row: &[Self], out: &mut [Pair]);
    /// `out[i] = (low[i], high[i])`.
    fn zip_rows(low: &[Self], high: &[Self], out: &mut [Pair]);
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(self) -> u16 {
        round(self)
    }
    fn copy(row: &[f32], out: &mut [f32]) {
        copy(row, out);
    }
    fn pair(row: &[f32], out: &mut [Pair]) {
        bf16::pair_row(row, out);
    }
    fn zip_rows(low: &[f32], high: &[f32], out: &mut [Pair]) {
        bf16::zip_rows(low, high, out);
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        bf16::widen(self.to_bits())
    }
    #[inline(always)]
    fn narrow(self) -> u16 {
        self.to_bits()
    }
    fn copy(row: &[Self], out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(row) {
            *out = x.widen();
        }
    }
    fn pair(row: &[Self], out: &mut [Pair]) {
        pairs(row, out);
    }
    fn zip_rows(low: &[Self], high: &[Self], out: &mut [Pair]) {
        zip_bf16(low, high, out);
    }
}

#[inline(always)]
fn pairs<E: Element>(row: &[E], out: &mut [Pair]) {
    let (whole, last) = row.as_chunks::<2>();
    for (out, [l, h]) in out.iter_mut().zip(whole) {
        *out = Pair(l.narrow() as u32 | (h.narrow() as u32) << 16);
    }
    if let ([x], Some(out)) = (last, out.last_mut()) {
        *out = Pair(x.narrow() as u32);
    }
}

#[inline(always)]
fn zip<E: Element>(low: &[E], high: &[E], out: &mut [Pair]) {
    for ((out, &l), &h) in out.iter_mut().zip(low).zip(high) {
        *out = Pair(l.narrow() as u32 | (h.narrow() as u32) << 16);
    }
}

per_isa! {
    fn zip_bf16(low: &[half::bf16], high: &[half::bf16], out: &mut [Pair]) {
        zip(low, high, out);
    }
}

/// An element of a panel: one f32, or a pair of bfloat16 along the summed index.
pub trait Lane: Copy + Default + Send + Sync + 'static {
    /// Steps of the summed index per lane.
    const STEPS: usize;
    /// Converts a row, whose index is the summed index, to lanes.
    fn copy_row<E: Element>(row: &[E], out: &mut [Self]);
    /// Converts [`Lane::STEPS`] rows, each of one step of the summed index, to one lane per column. The second row may be
    /// missing.
    fn copy_columns<E: Element>(first: &[E], second: Option<&[E]>, out: &mut [Self]);
    /// Adds a panel's products to a tile.
    ///
    /// # Safety
    /// As for [`tile::accumulate`].
    unsafe fn accumulate(rows: usize, a: &[Self], b: &[Self], out: Out);
    /// Calls `f` with this thread's buffer, which is kept between products.
    fn with_scratch<T>(f: impl FnOnce(&mut Vec<Self>) -> T) -> T;
}

impl Lane for f32 {
    const STEPS: usize = 1;
    fn copy_row<E: Element>(row: &[E], out: &mut [f32]) {
        E::copy(row, out);
    }
    fn copy_columns<E: Element>(first: &[E], _: Option<&[E]>, out: &mut [f32]) {
        E::copy(first, out);
    }
    unsafe fn accumulate(rows: usize, a: &[f32], b: &[f32], out: Out) {
        // SAFETY: the caller's promise.
        unsafe { tile::accumulate(rows, a, b, out) }
    }
    fn with_scratch<T>(f: impl FnOnce(&mut Vec<f32>) -> T) -> T {
        lend!(Vec<f32>, f)
    }
}

impl Lane for Pair {
    const STEPS: usize = 2;
    fn copy_row<E: Element>(row: &[E], out: &mut [Pair]) {
        E::pair(row, out);
    }
    fn copy_columns<E: Element>(first: &[E], second: Option<&[E]>, out: &mut [Pair]) {
        match second {
            Some(second) => E::zip_rows(first, second, out),
            None => {
                for (out, x) in out.iter_mut().zip(first) {
                    *out = Pair(x.narrow() as u32);
                }
            }
        }
    }
    unsafe fn accumulate(rows: usize, a: &[Pair], b: &[Pair], out: Out) {
        // SAFETY: the caller's promise.
        unsafe { bf16_tile::accumulate(rows, a, b, out) }
    }
    fn with_scratch<T>(f: impl FnOnce(&mut Vec<Pair>) -> T) -> T {
        lend!(Vec<Pair>, f)
    }
}

/// Rows between the row being packed and the row being prefetched.
const AHEAD: usize = 16;

/// Prefetches a range of a row in memory, and the same range of the next row.
#[inline(always)]
fn fetch<E>(data: &[E], at: usize, len: usize, stride: usize) {
    fetch_piece(data, at, len);
    fetch_piece(data, at + stride, len);
}

/// Prefetches `len` elements from `data[at]` on, which may be past its end.
#[inline(always)]
fn fetch_piece<E>(data: &[E], at: usize, len: usize) {
    for i in (0..len).step_by(64 / size_of::<E>()).chain(len.checked_sub(1)) {
        prefetch(data.as_ptr().wrapping_add(at + i));
    }
}

/// Copies a row. The widths of whole tiles are inlined.
#[inline(always)]
fn copy<T: Copy>(row: &[T], out: &mut [T]) {
    #[inline(always)]
    fn fixed<T: Copy, const N: usize>(row: &[T], out: &mut [T]) -> bool {
        match (row.first_chunk::<N>(), out.first_chunk_mut::<N>()) {
            (Some(row), Some(out)) => *out = *row,
            _ => return false,
        }
        true
    }
    let done = match row.len() {
        NR => fixed::<T, NR>(row, out),
        MR => fixed::<T, MR>(row, out),
        _ => false,
    };
    if !done {
        out[..row.len()].copy_from_slice(row);
    }
}

/// Panels that are packed together from a transposed matrix, so that longer ranges of memory are read.
const GROUP: usize = 4;

/// Packs columns of `part` into a `[lanes][NR]` panel, from column `at` of the panel on.
pub fn columns<E: Element, L: Lane>(part: &View<'_, E>, columns: std::ops::Range<usize>, panel: &mut [L], at: usize) {
    let depth = part.rows;
    if part.col_stride == 1 {
        for (lane, row) in panel.chunks_exact_mut(NR).enumerate() {
            let source = |k: usize| {
                let start = k * part.row_stride;
                &part.data[start + columns.start..start + columns.end]
            };
            let k = lane * L::STEPS;
            fetch(part.data, (k + AHEAD) * part.row_stride + columns.start, columns.len(), part.row_stride);
            let second = (L::STEPS > 1 && k + 1 < depth).then(|| source(k + 1));
            L::copy_columns(source(k), second, &mut row[at..at + columns.len()]);
        }
    } else {
        let columns = columns.enumerate().map(|(i, j)| {
            assert_eq!(part.row_stride, 1, "a view is row-major or the transpose of one");
            (at + i, &part.data[j * part.col_stride..j * part.col_stride + depth])
        });
        interleave::<_, _, NR>(columns, panel);
    }
}

/// Packs rows, whose index is the summed index, as columns of a `[lanes][WIDTH]` panel.
fn interleave<'a, E: Element + 'a, L: Lane, const WIDTH: usize>(
    rows: impl Iterator<Item = (usize, &'a [E])>,
    panel: &mut [L],
) {
    // Lanes that are converted at a time, before they are written to their column. The panel's part that they go to stays in
    // the first-level cache meanwhile.
    const BLOCK: usize = 64;
    let mut all: [(usize, &[E]); WIDTH] = [(0, &[]); WIDTH];
    let mut count = 0;
    for (slot, row) in all.iter_mut().zip(rows) {
        *slot = row;
        count += 1;
    }
    let mut lanes = [L::default(); BLOCK];
    for (block, panel) in panel.chunks_mut(WIDTH * BLOCK).enumerate() {
        let at = block * BLOCK * L::STEPS;
        for &(column, row) in &all[..count] {
            let steps = &row[at.min(row.len())..(at + BLOCK * L::STEPS).min(row.len())];
            fetch_piece(row, at + BLOCK * L::STEPS, BLOCK * L::STEPS);
            let n = steps.len().div_ceil(L::STEPS);
            L::copy_row(steps, &mut lanes[..n]);
            for (lane, out) in lanes[..n].iter().zip(panel.as_chunks_mut::<WIDTH>().0) {
                out[column] = *lane;
            }
        }
    }
}

/// Packs rows of `a`, for a range of `k`, into panels of [`panel_rows`], `lanes * MR` lanes apart.
pub fn rows<E: Element, L: Lane>(a: View<'_, E>, k: std::ops::Range<usize>, packed: &mut Vec<L>, parallel: bool) {
    let lanes = k.len().div_ceil(L::STEPS);
    let size = lanes * MR;
    // Rows past the last of `a` keep old values: their results are not used.
    packed.resize(a.rows.div_ceil(MR) * size, L::default());
    let transposed = a.col_stride != 1;
    assert!(!transposed || a.row_stride == 1, "a view is row-major or the transpose of one");
    let group = if transposed { GROUP } else { 1 };
    let fill = |first: usize, panels: &mut [L]| {
        let first = first * group;
        if transposed {
            return transposed_rows(a, k.clone(), first, panels, size);
        }
        let rows = panel_rows(a.rows, first).enumerate();
        let rows = rows.map(|(i, r)| (i, &a.data[r * a.row_stride + k.start..r * a.row_stride + k.end]));
        interleave::<_, _, MR>(rows, panels);
    };
    let size = (group * size).max(1);
    if parallel {
        for_each_chunk(packed, size, fill);
    } else {
        packed.chunks_mut(size).enumerate().for_each(|(p, panels)| fill(p, panels));
    }
}

/// Packs rows of a transposed matrix into panels of `size` lanes, of which the first is the `first`-th of the matrix.
fn transposed_rows<E: Element, L: Lane>(
    a: View<'_, E>,
    k: std::ops::Range<usize>,
    first: usize,
    panels: &mut [L],
    size: usize,
) {
    let all = panel_rows(a.rows, first).start..panel_rows(a.rows, first + panels.len().div_ceil(size) - 1).end;
    let source = |k: usize| {
        let start = k * a.col_stride;
        &a.data[start + all.start..start + all.end]
    };
    let mut row = [L::default(); GROUP * MR];
    let row = &mut row[..all.len()];
    for (lane, step) in k.clone().step_by(L::STEPS).enumerate() {
        fetch(a.data, (step + AHEAD) * a.col_stride + all.start, all.len(), a.col_stride);
        let second = (L::STEPS > 1 && step + 1 < k.end).then(|| source(step + 1));
        L::copy_columns(source(step), second, row);
        for (i, panel) in panels.chunks_mut(size).enumerate() {
            let rows = panel_rows(a.rows, first + i);
            copy(&row[rows.start - all.start..rows.end - all.start], &mut panel[lane * MR..]);
        }
    }
}
