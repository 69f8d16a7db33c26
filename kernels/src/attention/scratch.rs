//! Attention over packed sequences as products of small matrices: one task per family and key head, and its scratch.

use std::ops::Range;

use super::family::Family;
use super::heads::Heads;
use crate::gemm::{Packed, Precision, View};
use crate::team::{for_each, lend};

/// Queries per block of scores.
pub const BLOCK: usize = 48;

/// Rows of `x`, which is `width` wide, in the columns `at .. at + dim`.
pub fn rows<'a>(x: &'a [f32], width: usize, rows: &Range<usize>, at: usize, dim: usize) -> View<'a> {
    View::new(&x[rows.start * width..rows.end * width], rows.len(), width).columns(at..at + dim)
}

/// Keys or values as right-hand sides of products: those of a prompt, and of one of its completions.
pub struct Sides {
    prompt: Packed,
    completion: Packed,
}

impl Sides {
    pub fn empty() -> Self {
        Self { prompt: Packed::empty(Precision::F32), completion: Packed::empty(Precision::F32) }
    }

    /// Packs the current part, which has `past` rows before it: 0 for the prompt.
    pub fn set(&mut self, past: usize, matrix: View<'_>) {
        if past == 0 { &mut self.prompt } else { &mut self.completion }.fill(&[matrix], false);
    }

    /// The prompt, if the current part is a completion with one, and the current part.
    pub fn get(&self, past: usize) -> (Option<&Packed>, &Packed) {
        if past == 0 { (None, &self.prompt) } else { (Some(&self.prompt), &self.completion) }
    }
}

/// Buffers that the tasks of one thread reuse.
pub struct Scratch {
    pub keys_t: Sides,
    pub values: Sides,
    pub keys: Sides,
    pub values_t: Sides,
    pub queries: Packed,
    pub grads: Packed,
    pub scores: Vec<f32>,
    pub d_scores: Vec<f32>,
    pub d_keys: Vec<f32>,
    pub d_values: Vec<f32>,
}

impl Default for Scratch {
    fn default() -> Self {
        let sides = Sides::empty;
        let packed = || Packed::empty(Precision::F32);
        Self {
            keys_t: sides(),
            values: sides(),
            keys: sides(),
            values_t: sides(),
            queries: packed(),
            grads: packed(),
            scores: Vec::new(),
            d_scores: Vec::new(),
            d_keys: Vec::new(),
            d_values: Vec::new(),
        }
    }
}

/// Calls `work(family, key head, scratch)` in parallel for each family and key head.
pub fn for_each_task(families: &[Family], heads: &Heads, work: impl Fn(&Family, usize, &mut Scratch) + Sync) {
    for_each(families.len() * heads.keys, |task| {
        let (family, head) = (task / heads.keys, task % heads.keys);
        lend!(Scratch, |scratch: &mut Scratch| work(&families[family], head, scratch));
    });
}

/// Blocks of at most [`BLOCK`] rows.
pub fn blocks(part: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = part.end;
    part.clone().step_by(BLOCK).map(move |start| start..(start + BLOCK).min(end))
}

/// First columns of a key head's keys and values in a row of queries, keys and values.
pub fn columns(head: usize, heads: &Heads) -> (usize, usize) {
    let key = heads.query_width() + head * heads.dim;
    (key, key + heads.key_width())
}
