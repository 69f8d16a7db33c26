//! What generation computed, kept for the update that follows.
//!
//! A row is the same bits whatever runs beside it, so what was computed of a completion while it was sampled is what a
//! forward pass over it would compute. An update on fresh completions can begin with the way back.

use std::collections::HashMap;
use std::sync::Arc;

use super::block::{Activations, Rows};
use super::cpu::{Cpu, Kept, Recalled};
use super::ops::Mlp;
use crate::model::{Batch, Decoder};

/// Where the rows of one sequence are.
#[derive(Debug, Clone, Default)]
pub struct Trail {
    /// Of its last tokens, all but the very last: from the first that was not copied from a twin.
    rows: Vec<u32>,
    /// Among the rows that went through the head: one for each token of the completion.
    read: Vec<u32>,
}

/// A completion that ended, as it was sampled.
struct Said {
    trail: Trail,
    logprobs: Vec<f32>,
    lse: Vec<f32>,
}

/// A prompt's rows, and what was said to it.
#[derive(Default)]
struct Answered {
    rows: Vec<u32>,
    said: HashMap<Vec<u32>, Said>,
}

/// Writes down what passes compute, pass by pass.
pub struct Recorder {
    limit: usize,
    layers: Vec<Activations<Cpu>>,
    /// Rows of the passes before the last, and of those the ones that went through the head.
    before: (u32, u32),
    rows: usize,
    kept: Index,
}

/// Where everything is.
struct Index {
    temperature: f64,
    hidden: usize,
    /// The residual stream before the last norm of the rows that went through the head.
    stream: Vec<f32>,
    prompts: HashMap<Vec<u32>, Answered>,
}

impl Recorder {
    /// For `limit` rows at most, of which `expected` are expected, sampled at a temperature.
    pub fn new(decoder: &Decoder, limit: usize, expected: usize, temperature: f64) -> Self {
        let (arch, room) = (decoder.architecture(), limit.min(expected));
        let hidden = arch.hidden;
        let layer = |layer: usize| {
            let heads = arch.attention(layer);
            let of = |width: usize| Kept::with_capacity(decoder.precision(), room * width);
            Activations {
                x: of(hidden),
                qkv: of(heads.width()),
                attended: of(heads.query_width()),
                lse: Vec::with_capacity(room * heads.queries),
                projected: arch.sandwich.then(|| of(hidden)),
                middle: of(hidden),
                gate_up: of(Mlp::of(arch).input_width()),
                down: arch.sandwich.then(|| of(hidden)),
            }
        };
        let kept = Index { temperature, hidden, stream: Vec::new(), prompts: HashMap::new() };
        Self { limit, layers: (0..arch.layers).map(layer).collect(), before: (0, 0), rows: 0, kept }
    }

    /// Whether so many more rows can be kept.
    pub fn has_room(&self, rows: usize) -> bool {
        self.rows + rows <= self.limit
    }

    /// Where a layer's activations go.
    pub fn layer(&mut self, layer: usize) -> &mut Activations<Cpu> {
        &mut self.layers[layer]
    }

    /// Ends a pass of `rows` rows; `stream` is the residual stream of those that went through the head.
    pub fn end_pass(&mut self, rows: usize, stream: &[f32]) {
        self.before = (self.rows as u32, (self.kept.stream.len() / self.kept.hidden) as u32);
        self.rows += rows;
        self.kept.stream.extend_from_slice(stream);
    }

    /// Notes that a row of the last pass belongs to a sequence, and which of those that went through the head it is if it
    /// did.
    pub fn note(&self, trail: &mut Trail, row: usize, read: Option<usize>) {
        trail.rows.push(self.before.0 + row as u32);
        trail.read.extend(read.map(|read| self.before.1 + read as u32));
    }

    /// Notes a completion that ended.
    pub fn end(&mut self, prompt: &[u32], tokens: &[u32], trail: Trail, logprobs: &[f32], lse: &[f32]) {
        let answered = self.kept.prompts.entry(prompt.to_vec()).or_default();
        if trail.rows.len() + 1 == prompt.len() + tokens.len() {
            answered.rows = trail.rows[..prompt.len()].to_vec();
        }
        answered.said.insert(tokens.to_vec(), Said { trail, logprobs: logprobs.to_vec(), lse: lse.to_vec() });
    }

    /// All that was kept.
    pub fn finish(self) -> Recording {
        Recording { layers: self.layers.into_iter().map(Arc::new).collect(), kept: Arc::new(self.kept) }
    }
}

/// What generation computed of the completions of a call: their activations, for an update of the weights that they
/// were sampled from. Clones share memory.
#[derive(Clone)]
pub struct Recording {
    layers: Vec<Arc<Activations<Cpu>>>,
    kept: Arc<Index>,
}

impl Recording {
    /// Log-probabilities of a completion's tokens at a temperature, if it was sampled at that.
    pub fn logprobs(&self, prompt: &[u32], completion: &[u32], temperature: f64) -> Option<&[f32]> {
        let prompt = self.kept.prompts.get(prompt).filter(|_| temperature == self.kept.temperature)?;
        Some(&prompt.said.get(completion)?.logprobs)
    }

    /// Whether all of a batch is known.
    pub fn knows(&self, batch: &Batch, temperature: f64) -> bool {
        self.of(batch, temperature).is_some()
    }

    /// What is known of a batch, if all of it is.
    pub(super) fn of(&self, batch: &Batch, temperature: f64) -> Option<Found> {
        if temperature != self.kept.temperature || batch.targets.len() != batch.rows.len() {
            return None;
        }
        let hidden = self.kept.hidden;
        let mut found = Found::default();
        let mut spans = batch.spans().windows(2);
        for family in batch.families.iter() {
            let answered = self.kept.prompts.get(&batch.ids[family.prompt.clone()])?;
            if answered.rows.len() != family.prompt.len() {
                return None;
            }
            found.rows.extend(&answered.rows);
            for completion in &family.completions {
                let span = spans.next()?;
                let Said { trail, logprobs, lse } = answered.said.get(&batch.targets[span[0]..span[1]])?;
                found.rows.extend(&trail.rows[trail.rows.len().checked_sub(completion.len())?..]);
                for &row in &trail.read {
                    found.stream.extend(&self.kept.stream[row as usize * hidden..][..hidden]);
                }
                found.logprobs.extend(logprobs);
                found.lse.extend(lse);
            }
        }
        (found.rows.len() == batch.tokens() && found.lse.len() == batch.rows.len()).then_some(found)
    }

    /// Activations of each layer.
    pub(super) fn into_layers(self) -> Vec<Arc<Activations<Cpu>>> {
        self.layers
    }
}

impl Activations<Cpu> {
    /// Those of some rows, in another order.
    pub(super) fn recall(pass: &Rows<Cpu>, layer: usize, kept: &Arc<Self>, rows: &Arc<Vec<u32>>) -> Self {
        let heads = pass.heads(layer);
        let of = |which: fn(&Self) -> Option<&Kept>, width: usize| {
            Kept::Recalled(Recalled { from: kept.clone(), which, rows: rows.clone(), width })
        };
        let lse = |&row: &u32| &kept.lse[row as usize * heads.queries..][..heads.queries];
        Self {
            x: of(|a| Some(&a.x), pass.hidden),
            qkv: of(|a| Some(&a.qkv), heads.width()),
            attended: of(|a| Some(&a.attended), heads.query_width()),
            lse: rows.iter().flat_map(lse).copied().collect(),
            projected: kept.projected.as_ref().map(|_| of(|a| a.projected.as_ref(), pass.hidden)),
            middle: of(|a| Some(&a.middle), pass.hidden),
            gate_up: of(|a| Some(&a.gate_up), pass.mlp.input_width()),
            down: kept.down.as_ref().map(|_| of(|a| a.down.as_ref(), pass.hidden)),
        }
    }
}

/// Where a batch's rows are, and what the head said of those that it read.
#[derive(Default)]
pub(super) struct Found {
    pub rows: Vec<u32>,
    pub stream: Vec<f32>,
    pub logprobs: Vec<f32>,
    pub lse: Vec<f32>,
}
