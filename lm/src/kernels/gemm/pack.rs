//! Operands in panels: the summed index outermost, so that a tile reads both operands front to back.

use super::bf16::{Pair, round};
use super::tile::{MR, NR, panel_rows};
use super::{View, bf16, tile};
use crate::kernels::isa::per_isa;
use crate::kernels::team::{for_each_chunk, lend};

/// What a matrix is made of: f32 or bfloat16.
pub trait Element: Copy + Send + Sync {
    /// The value.
    fn widen(self) -> f32;
    /// The nearest bfloat16.
    fn narrow(self) -> u16;
    /// `out[i]` is element `i` of `row`.
    fn copy(row: &[Self], out: &mut [f32]);
    /// `out[i]` is elements `2 i` and `2 i + 1` of `row`, the second maybe missing at the end.
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
        out.copy_from_slice(row);
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
    /// Steps of the summed index in one element.
    const STEPS: usize;
    /// The lanes of one row, whose elements are steps.
    fn copy_row<E: Element>(row: &[E], out: &mut [Self]);
    /// Lanes of neighbouring columns, from rows of the matrix; `rows` has [`Lane::STEPS`], the last maybe missing.
    fn copy_columns<E: Element>(first: &[E], second: Option<&[E]>, out: &mut [Self]);
    /// Continues a tile.
    ///
    /// # Safety
    /// As for [`tile::accumulate`].
    unsafe fn accumulate(rows: usize, a: &[Self], b: &[Self], out: tile::Out);
    /// This thread's buffer, kept between products.
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
    unsafe fn accumulate(rows: usize, a: &[f32], b: &[f32], out: tile::Out) {
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
    unsafe fn accumulate(rows: usize, a: &[Pair], b: &[Pair], out: tile::Out) {
        // SAFETY: the caller's promise.
        unsafe { bf16::accumulate(rows, a, b, out) }
    }
    fn with_scratch<T>(f: impl FnOnce(&mut Vec<Pair>) -> T) -> T {
        lend!(Vec<Pair>, f)
    }
}

/// Writes columns of `part` into a `[lanes][NR]` panel, from column `at` of the panel on.
pub fn columns<E: Element, L: Lane>(part: &View<'_, E>, columns: std::ops::Range<usize>, panel: &mut [L], at: usize) {
    let depth = part.rows;
    if part.col_stride == 1 {
        for (lane, row) in panel.chunks_exact_mut(NR).enumerate() {
            let source = |k: usize| {
                let start = k * part.row_stride;
                &part.data[start + columns.start..start + columns.end]
            };
            let k = lane * L::STEPS;
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

/// Writes rows of steps to columns of a panel `[lanes][WIDTH]`.
fn interleave<'a, E: Element + 'a, L: Lane, const WIDTH: usize>(
    rows: impl Iterator<Item = (usize, &'a [E])>,
    panel: &mut [L],
) {
    // Lanes that are made at a time, in a row of their own, before they are spread over the panel.
    const BLOCK: usize = 64;
    let mut lanes = [L::default(); BLOCK];
    for (column, row) in rows {
        for (steps, panel) in row.chunks(BLOCK * L::STEPS).zip(panel.chunks_mut(WIDTH * BLOCK)) {
            let n = steps.len().div_ceil(L::STEPS);
            L::copy_row(steps, &mut lanes[..n]);
            for (lane, out) in lanes[..n].iter().zip(panel.as_chunks_mut::<WIDTH>().0) {
                out[column] = *lane;
            }
        }
    }
}

/// Packs rows of `a`, for the given range of `k`, into panels ([`panel_rows`]); panels lie `lanes * MR` apart.
pub fn rows<E: Element, L: Lane>(a: View<'_, E>, k: std::ops::Range<usize>, packed: &mut Vec<L>, parallel: bool) {
    let lanes = k.len().div_ceil(L::STEPS);
    let size = lanes * MR;
    // Rows past the last of `a` keep what was there: their results are not used.
    packed.resize(a.rows.div_ceil(MR) * size, L::default());
    let fill = |p: usize, panel: &mut [L]| {
        let rows = panel_rows(a.rows, p);
        if a.col_stride == 1 {
            let rows =
                rows.enumerate().map(|(i, r)| (i, &a.data[r * a.row_stride + k.start..r * a.row_stride + k.end]));
            interleave::<_, _, MR>(rows, panel);
        } else {
            assert_eq!(a.row_stride, 1, "a view is row-major or the transpose of one");
            for (lane, column) in panel.chunks_exact_mut(MR).enumerate() {
                let source = |k: usize| {
                    let start = k * a.col_stride + rows.start * a.row_stride;
                    &a.data[start..]
                };
                let step = k.start + lane * L::STEPS;
                let second = (L::STEPS > 1 && step + 1 < k.end).then(|| source(step + 1));
                let n = rows.len();
                L::copy_columns(&source(step)[..n], second.map(|s| &s[..n]), &mut column[..n]);
            }
        }
    };
    if parallel {
        for_each_chunk(packed, size, fill);
    } else {
        packed.chunks_mut(size.max(1)).enumerate().for_each(|(p, panel)| fill(p, panel));
    }
}
