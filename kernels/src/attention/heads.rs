//! The shape of an attention layer, and the softmax of a row of its scores.

use crate::math::{exp_row, max, softcap_scaled};

/// Tokens per block of keys in the KV cache. Each block is stored transposed, so that it is read front to back.
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
    /// Sliding window: a query attends to at most this many keys, including its own; `None` is all.
    pub window: Option<usize>,
    /// Scaled scores are softcapped to `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

impl Heads {
    /// Query heads per key head.
    pub fn group(&self) -> usize {
        self.queries / self.keys
    }

    /// First key that the query at `position` attends to.
    pub fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// Columns of all query heads.
    pub fn query_width(&self) -> usize {
        self.queries * self.dim
    }

    /// Columns of all key heads, which is also that of the value heads.
    pub fn key_width(&self) -> usize {
        self.keys * self.dim
    }

    /// Columns of a row of queries, keys and values side by side.
    pub fn width(&self) -> usize {
        self.query_width() + 2 * self.key_width()
    }
}

/// Replaces scores by unnormalised probabilities; returns the largest scaled score and the sum of the probabilities.
#[inline(always)]
pub fn softmax(row: &mut [f32], heads: &Heads) -> (f32, f32) {
    match heads.softcap {
        None => {
            let top = max(row) * heads.scale;
            (top, exp_row(row, heads.scale, top))
        }
        Some(cap) => {
            softcap_scaled(row, heads.scale, cap);
            let top = max(row);
            (top, exp_row(row, 1.0, top))
        }
    }
}
