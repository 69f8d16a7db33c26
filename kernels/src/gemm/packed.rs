//! Right-hand sides of products, packed once and kept.

use super::bf16::Pair;
use super::pack::{self, Element, Lane};
use super::panel::NR;
use super::view::View;
use crate::team::for_each_chunk;

/// Precision of the factors of products. Sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Factors are not rounded.
    #[default]
    F32,
    /// Factors are rounded to the nearest bfloat16.
    Bf16,
}

impl Precision {
    /// Type in which weights that are not trained are stored.
    pub fn dtype(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
        }
    }
}

/// A right-hand side, packed in panels of a fixed number of columns.
pub struct Packed {
    pub(super) panels: Panels,
    pub(super) depth: usize,
    pub(super) cols: usize,
}

pub(super) enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<Pair>),
}

impl Packed {
    /// Packs a matrix of shape `[k, n]`.
    pub fn new<E: Element>(b: View<'_, E>, precision: Precision) -> Self {
        Self::concat(&[b], precision)
    }

    /// Packs matrices of equal depth side by side, as one matrix.
    pub fn concat<E: Element>(parts: &[View<'_, E>], precision: Precision) -> Self {
        let mut packed = Self::empty(precision);
        packed.fill(parts, true);
        packed
    }

    /// An empty matrix; [`Packed::fill`] packs into it.
    pub fn empty(precision: Precision) -> Self {
        let panels = match precision {
            Precision::F32 => Panels::F32(Vec::new()),
            Precision::Bf16 => Panels::Bf16(Vec::new()),
        };
        Self { panels, depth: 0, cols: 0 }
    }

    /// Replaces the contents by matrices of equal depth, packed side by side. Reuses the memory.
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

/// Packs panels. A panel is contiguous over the whole depth, so that a block of depth is a sub-slice of it.
fn fill_panels<E: Element, L: Lane>(
    data: &mut Vec<L>,
    parts: &[View<'_, E>],
    depth: usize,
    cols: usize,
    parallel: bool,
) {
    let size = NR * depth.div_ceil(L::STEPS);
    // Columns past the last keep old values: their results are not used.
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
    pub(super) packed: &'a Packed,
    pub(super) depth: usize,
    pub(super) cols: usize,
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
