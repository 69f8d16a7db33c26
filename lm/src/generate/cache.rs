//! KV cache of the sequences in flight, preallocated: one slot per sequence.

use rehearsal_kernels::Shared;
use rehearsal_kernels::attention::{Heads, KEY_BLOCK};
use rehearsal_kernels::team::for_each;

use crate::model::Architecture;

/// A row of a forward pass: one token of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub slot: usize,
    pub position: usize,
    pub token: u32,
    pub wants_logits: bool,
}

/// KV cache: keys `[length / KEY_BLOCK][dim][KEY_BLOCK]` and values `[length][dim]` of every layer, slot and key head.
pub struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
    layout: CacheLayout,
}

/// Offsets into the keys and the values, which are the same for both.
struct CacheLayout {
    heads: Heads,
    /// First token of each slot within a layer, and at the end the number of tokens of a layer.
    starts: Vec<usize>,
}

impl CacheLayout {
    fn slots(&self) -> usize {
        self.starts.len() - 1
    }

    fn length(&self, slot: usize) -> usize {
        self.starts[slot + 1] - self.starts[slot]
    }

    fn range(&self, layer: usize, slot: usize, head: usize) -> std::ops::Range<usize> {
        let size = self.heads.dim * self.length(slot);
        let tokens = layer * self.starts[self.slots()] + self.starts[slot];
        let at = tokens * self.heads.key_width() + head * size;
        at..at + size
    }
}

impl Cache {
    /// Allocates slots for sequences of these lengths in tokens.
    pub fn new(architecture: &Architecture, lengths: &[usize]) -> Self {
        let heads = architecture.attention(0);
        let mut starts = vec![0];
        let mut end = 0;
        starts.extend(lengths.iter().map(|length| {
            end += length.next_multiple_of(KEY_BLOCK);
            end
        }));
        let floats = architecture.layers * end * heads.key_width();
        Self { keys: vec![0.0; floats], values: vec![0.0; floats], layout: CacheLayout { heads, starts } }
    }

    /// Whether the slots are large enough for sequences of these lengths.
    pub fn fits(&self, lengths: &[usize]) -> bool {
        lengths.len() <= self.layout.slots() && lengths.iter().enumerate().all(|(i, &n)| n <= self.layout.length(i))
    }

    /// Keys and values of a key head of a slot.
    pub fn head(&self, layer: usize, slot: usize, head: usize) -> (&[f32], &[f32]) {
        let range = self.layout.range(layer, slot, head);
        (&self.keys[range.clone()], &self.values[range])
    }

    /// Stores the keys and values of rows `[queries | keys | values]` at their positions.
    pub fn append(&mut self, layer: usize, rows: &[Row], qkv: &[f32]) {
        let (layout, heads) = (&self.layout, self.layout.heads);
        let (dim, width) = (heads.dim, heads.width());
        let (q, kv) = (heads.query_width(), heads.key_width());
        let (all_keys, all_values) = (Shared::new(&mut self.keys), Shared::new(&mut self.values));
        for_each(rows.len(), |i| {
            let (keys, values) = qkv[i * width + q..(i + 1) * width].split_at(kv);
            let (block, place) = (rows[i].position / KEY_BLOCK, rows[i].position % KEY_BLOCK);
            for head in 0..heads.keys {
                let start = layout.range(layer, rows[i].slot, head).start;
                let columns = head * dim..(head + 1) * dim;
                // SAFETY: no two rows have the same slot and position, so no other task writes these elements.
                unsafe {
                    for (d, &k) in keys[columns.clone()].iter().enumerate() {
                        all_keys.slice(start + (block * dim + d) * KEY_BLOCK + place, 1)[0] = k;
                    }
                    all_values.slice(start + rows[i].position * dim, dim).copy_from_slice(&values[columns]);
                }
            }
        });
    }

    /// Copies the first `len` tokens of a slot to another, so that completions share the prefill of their prompt.
    pub fn copy_prefix(&mut self, layers: usize, from: usize, to: usize, len: usize) {
        let (layout, dim) = (&self.layout, self.layout.heads.dim);
        // Keys are copied in whole blocks; positions from `len` on are overwritten before they are read.
        let keys = len.div_ceil(KEY_BLOCK) * KEY_BLOCK * dim;
        for layer in 0..layers {
            for head in 0..layout.heads.keys {
                let [source, target] = [from, to].map(|slot| layout.range(layer, slot, head).start);
                self.keys.copy_within(source..source + keys, target);
                self.values.copy_within(source..source + len * dim, target);
            }
        }
    }
}
