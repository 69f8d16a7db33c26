//! Panels and tiles: the unit in which a matrix product is packed and computed.
//!
//! A tile of the result is up to [`MR`] rows by [`NR`] columns. Panels of the factors are packed with the summed index
//! outermost: `a[k * MR + i]`, `b[k * NR + j]`.

use crate::isa::prefetch;

/// Rows of a tile.
pub const MR: usize = 12;
/// Columns of a tile.
pub const NR: usize = 32;

/// A tile in memory of its own, for results that do not fill a whole tile of the output.
pub type Tile = [f32; MR * NR];

/// Where a tile's sums are written: rows of [`NR`] columns, `stride` apart.
#[derive(Clone, Copy)]
pub struct Out {
    pub start: *mut f32,
    pub stride: usize,
    /// Sums start from the values there; else from zero.
    pub add: bool,
    pub fetch: Fetch,
}

/// What a tile prefetches for later tiles: with each step of the summed index `step` elements (at most [`NR`]), starting
/// `from` elements after the start of its right-hand panel.
#[derive(Clone, Copy, Default)]
pub struct Fetch {
    pub from: usize,
    pub step: usize,
}

impl Fetch {
    /// Starts prefetching, for a tile that reads `panel`.
    #[inline(always)]
    pub fn ahead_of<L>(self, panel: *const L) -> Ahead<L> {
        Ahead { at: panel.wrapping_add(self.from), step: self.step }
    }
}

/// A [`Fetch`] in progress.
pub struct Ahead<L> {
    at: *const L,
    step: usize,
}

impl<L> Ahead<L> {
    /// Prefetches the elements of one step of the summed index: two cache lines at most.
    #[inline(always)]
    pub fn go_on(&mut self) {
        prefetch(self.at);
        prefetch(self.at.wrapping_add(self.step / 2));
        self.at = self.at.wrapping_add(self.step);
    }
}

impl Out {
    /// Writes to a tile in memory of its own.
    pub fn tile(tile: &mut Tile, add: bool) -> Self {
        Self { start: tile.as_mut_ptr(), stride: NR, add, fetch: Fetch::default() }
    }
}

/// Rows of panel number `panel`, of a matrix of `rows` rows: [`MR`] each. If the last panel would have few rows, it takes
/// some of the panel before, since narrow tiles are slow.
pub fn panel_rows(rows: usize, panel: usize) -> std::ops::Range<usize> {
    const MOVED: usize = 4;
    let panels = rows.div_ceil(MR);
    let moves = panels > 1 && (1..=MOVED).contains(&(rows % MR));
    let end = |panel: usize| match panels - panel {
        1 => rows,
        2 if moves => (panel + 1) * MR - MOVED,
        _ => (panel + 1) * MR,
    };
    panel.checked_sub(1).map_or(0, end)..end(panel)
}

/// Rows that a kernel may write when `rows` are asked for, on any instruction set.
pub fn rows_written(rows: usize) -> usize {
    match rows {
        0..=4 => rows,
        5 | 6 => 6,
        7 | 8 => 8,
        _ => MR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_cover_all_rows_in_order() {
        for rows in 1..100usize {
            let panels: Vec<_> = (0..rows.div_ceil(MR)).map(|p| panel_rows(rows, p)).collect();
            assert_eq!(panels.iter().flat_map(|p| p.clone()).collect::<Vec<_>>(), (0..rows).collect::<Vec<_>>());
            assert!(panels.iter().all(|p| p.len() <= MR && (panels.len() == 1 || p.len() > 4)), "{panels:?}");
        }
        assert_eq!(panel_rows(16, 0), 0..8);
    }
}
