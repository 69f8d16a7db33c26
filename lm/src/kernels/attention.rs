//! Causal grouped-query attention. Scores exist for a block of queries at a time and are computed again on the way
//! back.
//!
//! Generation ([`attend`]: one new row against a cache) and training ([`forward`]: whole families of sequences)
//! build each element by the same chain, so the sampler's log-probabilities and the trainer's are the same bits.

mod packed;

use super::isa::per_isa;
use super::math::{bend, exp_row, max};

pub use packed::{Family, Saved, backward, forward};

/// The cache holds keys in blocks of this many, each transposed: the reader goes through it from front to back.
pub const KEY_BLOCK: usize = 64;

/// Shape of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads; divides `queries`.
    pub keys: usize,
    /// Width of a head.
    pub dim: usize,
    /// Factor on the scores, usually `1 / sqrt(dim)`.
    pub scale: f32,
    /// A query sees at most this many keys, itself included; `None` sees all.
    pub window: Option<usize>,
    /// Scaled scores are bent to `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

impl Heads {
    /// Query heads that share a key head.
    pub fn group(&self) -> usize {
        self.queries / self.keys
    }

    /// First key that the query at `position` sees.
    pub fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// Columns of the queries of all heads.
    pub fn query_width(&self) -> usize {
        self.queries * self.dim
    }

    /// Columns of the keys (or the values) of all heads.
    pub fn key_width(&self) -> usize {
        self.keys * self.dim
    }

    /// Columns of queries, keys and values side by side.
    pub fn width(&self) -> usize {
        self.query_width() + 2 * self.key_width()
    }
}

per_isa! {
    /// One query against the keys `first..len` of a cache.
    ///
    /// `keys` is `[blocks][dim][KEY_BLOCK]`, `values` has a row every `value_stride`. `scores` is scratch of at least
    /// [`KEY_BLOCK`] for each block.
    pub fn attend(
        query: &[f32],
        keys: &[f32],
        values: &[f32],
        value_stride: usize,
        first: usize,
        len: usize,
        heads: &Heads,
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        products(query, keys, first, len, scores);
        let row = &mut scores[first..len];
        let (_, total) = softmax(row, heads);
        weighted_sum(row, &values[first * value_stride..], value_stride, out);
        let inverse = 1.0 / total;
        for x in out.iter_mut() {
            *x *= inverse;
        }
    }
}

/// Turns scores into unnormalised probabilities; returns their largest scaled score and their sum.
#[inline(always)]
fn softmax(row: &mut [f32], heads: &Heads) -> (f32, f32) {
    match heads.softcap {
        None => {
            let top = max(row) * heads.scale;
            (top, exp_row(row, heads.scale, top))
        }
        Some(cap) => {
            bend(row, heads.scale, cap);
            let top = max(row);
            (top, exp_row(row, 1.0, top))
        }
    }
}

/// `out[j] = Σ_d x[d] * keys[j][d]` for the blocks that cover `first..len`.
#[inline(always)]
fn products(x: &[f32], keys: &[f32], first: usize, len: usize, out: &mut [f32]) {
    for block in first / KEY_BLOCK..len.div_ceil(KEY_BLOCK) {
        let mut lanes = [0.0f32; KEY_BLOCK];
        let columns = keys[block * x.len() * KEY_BLOCK..].as_chunks::<KEY_BLOCK>().0;
        for (&x, column) in x.iter().zip(columns) {
            for i in 0..KEY_BLOCK {
                lanes[i] = x.mul_add(column[i], lanes[i]);
            }
        }
        out[block * KEY_BLOCK..(block + 1) * KEY_BLOCK].copy_from_slice(&lanes);
    }
}

/// `out = Σ_j weights[j] * rows[j]`, each element one chain in the order of `j`.
#[inline(always)]
fn weighted_sum(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    match out.len() {
        n if n % 64 == 0 => weighted_blocks::<64>(weights, rows, stride, out),
        n if n % 32 == 0 => weighted_blocks::<32>(weights, rows, stride, out),
        n if n % 8 == 0 => weighted_blocks::<8>(weights, rows, stride, out),
        _ => weighted_blocks::<1>(weights, rows, stride, out),
    }
}

#[inline(always)]
fn weighted_blocks<const W: usize>(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    for (block, out) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
        let mut lanes = [0.0f32; W];
        for (j, &w) in weights.iter().enumerate() {
            let row: &[f32; W] = rows[j * stride + block * W..].first_chunk().expect("a whole row");
            for i in 0..W {
                lanes[i] = w.mul_add(row[i], lanes[i]);
            }
        }
        *out = lanes;
    }
}
