//! Causal grouped-query attention. Scores exist for a block of queries at a time and are computed again on the way
//! back.
//!
//! Generation ([`attend`]: one new row against a cache) and training ([`forward`]: whole families of sequences)
//! build each element by the same chain, so the sampler's log-probabilities and the trainer's are the same bits.

mod cached;
mod packed;

use super::math::{bend, exp_row, max};

pub use cached::attend;
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
