//! Keys and values of the sequences being generated, preallocated: one slot a sequence.

use rehearsal_kernels::Shared;
use rehearsal_kernels::attention::{Heads, KEY_BLOCK};
use rehearsal_kernels::team::for_each;

use crate::model::Architecture;

/// One token of one sequence on its way through the model.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub slot: usize,
    pub position: usize,
    pub token: u32,
    pub wants_logits: bool,
}

/// Keys (`[length / KEY_BLOCK][dim][KEY_BLOCK]`) and values (`[length][dim]`) of every layer, slot and key head.
pub struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
    places: Places,
}

/// Where a head of a slot of a layer lies in keys and values alike.
struct Places {
    heads: Heads,
    /// Tokens before each slot, in all slots of a layer at the end.
    starts: Vec<usize>,
}

impl Places {
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
    /// Slots for sequences of these lengths.
    pub fn new(architecture: &Architecture, lengths: &[usize]) -> Self {
        let heads = architecture.attention(0);
        let mut starts = vec![0];
        let mut end = 0;
        starts.extend(lengths.iter().map(|length| {
            end += length.next_multiple_of(KEY_BLOCK);
            end
        }));
        let floats = architecture.layers * end * heads.key_width();
        Self { keys: vec![0.0; floats], values: vec![0.0; floats], places: Places { heads, starts } }
    }

    /// Whether this cache has slots of these lengths.
    pub fn fits(&self, lengths: &[usize]) -> bool {
        lengths.len() <= self.places.slots() && lengths.iter().enumerate().all(|(i, &n)| n <= self.places.length(i))
    }

    /// Keys and values of one head of one sequence.
    pub fn head(&self, layer: usize, slot: usize, head: usize) -> (&[f32], &[f32]) {
        let range = self.places.range(layer, slot, head);
        (&self.keys[range.clone()], &self.values[range])
    }

    /// Stores the keys and values of rows `[queries | keys | values]` at their positions.
    pub fn append(&mut self, layer: usize, rows: &[Row], qkv: &[f32]) {
        let (places, heads) = (&self.places, self.places.heads);
        let (dim, width) = (heads.dim, heads.width());
        let (q, kv) = (heads.query_width(), heads.key_width());
        let (all_keys, all_values) = (Shared::new(&mut self.keys), Shared::new(&mut self.values));
        for_each(rows.len(), |i| {
            let (keys, values) = qkv[i * width + q..(i + 1) * width].split_at(kv);
            let (block, place) = (rows[i].position / KEY_BLOCK, rows[i].position % KEY_BLOCK);
            for head in 0..heads.keys {
                let start = places.range(layer, rows[i].slot, head).start;
                let columns = head * dim..(head + 1) * dim;
                // SAFETY: no two rows have the same slot and position, so this place belongs to this task.
                unsafe {
                    for (d, &k) in keys[columns.clone()].iter().enumerate() {
                        all_keys.slice(start + (block * dim + d) * KEY_BLOCK + place, 1)[0] = k;
                    }
                    all_values.slice(start + rows[i].position * dim, dim).copy_from_slice(&values[columns]);
                }
            }
        });
    }

    /// Copies the first `len` tokens of a slot to another: completions of one prompt compute it once.
    pub fn copy_prefix(&mut self, layers: usize, from: usize, to: usize, len: usize) {
        let (places, dim) = (&self.places, self.places.heads.dim);
        // Whole blocks: what lies past the last token is written before it is read.
        let keys = len.div_ceil(KEY_BLOCK) * KEY_BLOCK * dim;
        for layer in 0..layers {
            for head in 0..places.heads.keys {
                let [source, target] = [from, to].map(|slot| places.range(layer, slot, head).start);
                self.keys.copy_within(source..source + keys, target);
                self.values.copy_within(source..source + len * dim, target);
            }
        }
    }
}
