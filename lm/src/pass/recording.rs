//! What generation computed, kept for the update that follows.
//!
//! A row is the same bits whatever runs beside it, so what was computed of a completion while it was sampled is what a
//! forward pass over it would compute. An update on fresh completions can begin with the way back.

use std::collections::HashMap;
use std::sync::Arc;

use super::block::{Activations, Rows};
use super::cpu::{Cpu, Kept, Recalled};
use crate::model::Batch;

/// A row of one of generation's passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pass: u32,
    pub row: u32,
}

/// Where the rows of one sequence are.
#[derive(Debug, Clone, Default)]
pub struct Trail {
    /// Of its last tokens, all but the very last: from the first that was not copied from a twin.
    rows: Vec<Place>,
    /// Among the rows that went through the head: one for each token of the completion.
    read: Vec<Place>,
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
    rows: Vec<Place>,
    said: HashMap<Vec<u32>, Said>,
}

/// Writes down what passes compute.
pub struct Recorder {
    limit: usize,
    rows: usize,
    passes: u32,
    /// Activations of each layer, pass by pass.
    layers: Vec<Vec<Activations<Cpu>>>,
    kept: Index,
}

/// Where everything is.
struct Index {
    temperature: f64,
    /// The residual stream before the last norm, pass by pass, of the rows that went through the head.
    streams: Vec<Vec<f32>>,
    prompts: HashMap<Vec<u32>, Answered>,
}

impl Recorder {
    /// For `limit` rows at most, sampled at a temperature.
    pub fn new(layers: usize, limit: usize, temperature: f64) -> Self {
        let kept = Index { temperature, streams: Vec::new(), prompts: HashMap::new() };
        Self { limit, rows: 0, passes: 0, layers: (0..layers).map(|_| Vec::new()).collect(), kept }
    }

    /// Whether so many more rows can be kept.
    pub fn has_room(&self, rows: usize) -> bool {
        self.rows + rows <= self.limit
    }

    /// Keeps a layer's activations of the pass under way.
    pub fn keep(&mut self, layer: usize, activations: Activations<Cpu>) {
        self.layers[layer].push(activations);
    }

    /// Ends a pass of `rows` rows; `stream` is the residual stream of those that went through the head.
    pub fn end_pass(&mut self, rows: usize, stream: &[f32]) {
        self.rows += rows;
        self.passes += 1;
        self.kept.streams.push(stream.to_vec());
    }

    /// Notes that a row of the last pass belongs to a sequence, and where it went through the head if it did.
    pub fn note(&self, trail: &mut Trail, row: usize, read: Option<usize>) {
        let place = |row: usize| Place { pass: self.passes - 1, row: row as u32 };
        trail.rows.push(place(row));
        trail.read.extend(read.map(place));
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
    layers: Vec<Arc<Vec<Activations<Cpu>>>>,
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
        self.of(batch, temperature, 0).is_some()
    }

    /// What is known of a batch for a model of width `hidden`, if all of it is.
    pub(super) fn of(&self, batch: &Batch, temperature: f64, hidden: usize) -> Option<Found> {
        if temperature != self.kept.temperature || batch.targets.len() != batch.rows.len() {
            return None;
        }
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
                for place in &trail.read {
                    let at = place.row as usize * hidden;
                    found.stream.extend(&self.kept.streams[place.pass as usize][at..at + hidden]);
                }
                found.logprobs.extend(logprobs);
                found.lse.extend(lse);
            }
        }
        (found.rows.len() == batch.tokens() && found.lse.len() == batch.rows.len()).then_some(found)
    }

    /// Activations of each layer, pass by pass.
    pub(super) fn into_layers(self) -> Vec<Arc<Vec<Activations<Cpu>>>> {
        self.layers
    }
}

impl Activations<Cpu> {
    /// Those of rows that went through a layer in other passes.
    pub(super) fn recall(rows: &Rows<Cpu>, layer: usize, passes: Arc<Vec<Self>>, places: &Arc<Vec<Place>>) -> Self {
        let heads = rows.heads(layer);
        let of = |which: fn(&Self) -> Option<&Kept>, width: usize| {
            let passes = passes.clone();
            Kept::Recalled(Recalled { passes, which, rows: places.clone(), width })
        };
        let hidden = rows.hidden;
        let sandwich = passes.first().is_some_and(|p| p.down.is_some());
        let mut lse = Vec::with_capacity(places.len() * heads.queries);
        for place in places.iter() {
            let at = place.row as usize * heads.queries;
            lse.extend(&passes[place.pass as usize].lse[at..at + heads.queries]);
        }
        Self {
            x: of(|a| Some(&a.x), hidden),
            qkv: of(|a| Some(&a.qkv), heads.width()),
            attended: of(|a| Some(&a.attended), heads.query_width()),
            lse,
            projected: sandwich.then(|| of(|a| a.projected.as_ref(), hidden)),
            middle: of(|a| Some(&a.middle), hidden),
            gate_up: of(|a| Some(&a.gate_up), rows.mlp.input_width()),
            down: sandwich.then(|| of(|a| a.down.as_ref(), hidden)),
        }
    }
}

/// Where a batch's rows are, and what the head said of those that it read.
#[derive(Default)]
pub(super) struct Found {
    pub rows: Vec<Place>,
    pub stream: Vec<f32>,
    pub logprobs: Vec<f32>,
    pub lse: Vec<f32>,
}
