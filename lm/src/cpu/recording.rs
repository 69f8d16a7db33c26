//! Activations that generation computed, recorded for the update that follows.
//!
//! Kernels are batch-invariant, so the activations of a completion while it was sampled are those that a forward pass over
//! it would compute. An update on fresh completions starts with the backward pass.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Error, Result, Tensor};

use super::kept::{Kept, Recalled};
use super::machine::Cpu;
use crate::model::{Batch, Decoder};
use crate::pass::{Activations, Answers, Mlp, Rows, Trace};

/// Indices of the recorded rows of one sequence.
#[derive(Debug, Clone, Default)]
pub struct Trail {
    /// Row of each token but the last, from the first not copied from another request's cached prefix.
    rows: Vec<u32>,
    /// Index among the rows that went through the head, for each token of the completion.
    read: Vec<u32>,
}

/// A finished completion.
struct Finished {
    trail: Trail,
    logprobs: Vec<f32>,
    lse: Vec<f32>,
}

/// Rows of a prompt, and its completions by their tokens.
#[derive(Default)]
struct Prompt {
    rows: Vec<u32>,
    completions: HashMap<Vec<u32>, Finished>,
}

/// Records the activations of consecutive passes.
pub struct Recorder {
    limit: usize,
    layers: Vec<Activations<Cpu>>,
    /// Rows of all passes before the last, and how many of them went through the head.
    before: (u32, u32),
    rows: usize,
    kept: Index,
}

/// Where the activations of each prompt and completion are.
struct Index {
    temperature: f64,
    hidden: usize,
    /// The residual stream before the final norm, of the rows that went through the head.
    stream: Vec<f32>,
    prompts: HashMap<Vec<u32>, Prompt>,
}

impl Recorder {
    /// A recorder of at most `limit` rows, with memory for `expected`, of completions sampled at a temperature.
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

    /// Whether `rows` more rows can be recorded.
    pub fn has_room(&self, rows: usize) -> bool {
        self.rows + rows <= self.limit
    }

    /// The activations of a layer, to be appended to.
    pub fn layer(&mut self, layer: usize) -> &mut Activations<Cpu> {
        &mut self.layers[layer]
    }

    /// Ends a pass of `rows` rows; `stream` is the residual stream of the rows that went through the head.
    pub fn end_pass(&mut self, rows: usize, stream: &[f32]) {
        self.before = (self.rows as u32, (self.kept.stream.len() / self.kept.hidden) as u32);
        self.rows += rows;
        self.kept.stream.extend_from_slice(stream);
    }

    /// Adds a row of the last pass to a sequence; `read` is its index among the rows that went through the head, if it did.
    pub fn note(&self, trail: &mut Trail, row: usize, read: Option<usize>) {
        trail.rows.push(self.before.0 + row as u32);
        trail.read.extend(read.map(|read| self.before.1 + read as u32));
    }

    /// Adds a finished completion.
    pub fn end(&mut self, prompt: &[u32], tokens: &[u32], trail: Trail, logprobs: &[f32], lse: &[f32]) {
        let entry = self.kept.prompts.entry(prompt.to_vec()).or_default();
        if trail.rows.len() + 1 == prompt.len() + tokens.len() {
            entry.rows = trail.rows[..prompt.len()].to_vec();
        }
        entry.completions.insert(tokens.to_vec(), Finished { trail, logprobs: logprobs.to_vec(), lse: lse.to_vec() });
    }

    /// The recording.
    pub fn finish(self) -> Recording {
        Recording { layers: self.layers.into_iter().map(Arc::new).collect(), kept: Arc::new(self.kept) }
    }
}

/// Activations of the completions of one call of generation, for an update of the weights that they were sampled from.
/// Clones share memory.
#[derive(Clone)]
pub struct Recording {
    layers: Vec<Arc<Activations<Cpu>>>,
    kept: Arc<Index>,
}

impl Recording {
    /// Log-probabilities of a completion's tokens, if it is recorded and was sampled at this temperature.
    pub fn logprobs(&self, prompt: &[u32], completion: &[u32], temperature: f64) -> Option<&[f32]> {
        let prompt = self.kept.prompts.get(prompt).filter(|_| temperature == self.kept.temperature)?;
        Some(&prompt.completions.get(completion)?.logprobs)
    }

    /// Whether all of a batch is recorded.
    pub fn knows(&self, batch: &Batch, temperature: f64) -> bool {
        self.of(batch, temperature).is_some()
    }

    /// The rows of a batch, if all of it is recorded.
    fn of(&self, batch: &Batch, temperature: f64) -> Option<Found> {
        if temperature != self.kept.temperature || batch.targets.len() != batch.rows.len() {
            return None;
        }
        let hidden = self.kept.hidden;
        let mut found = Found::default();
        let mut spans = batch.spans().windows(2);
        for family in batch.families.iter() {
            let prompt = self.kept.prompts.get(&batch.ids[family.prompt.clone()])?;
            if prompt.rows.len() != family.prompt.len() {
                return None;
            }
            found.rows.extend(&prompt.rows);
            for completion in &family.completions {
                let span = spans.next()?;
                let Finished { trail, logprobs, lse } = prompt.completions.get(&batch.targets[span[0]..span[1]])?;
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

    /// The forward pass over a batch, from its recorded activations; `None` if any are missing.
    pub(crate) fn trace<'a>(
        self,
        ops: Cpu,
        decoder: &'a Decoder,
        batch: &Batch,
        temperature: f64,
    ) -> Result<Option<Trace<'a, Cpu>>> {
        let Some(found) = self.of(batch, temperature) else { return Ok(None) };
        let places = Arc::new(found.rows);
        let activations = |rows: &Rows<Cpu>| {
            let layers = self.layers.iter().enumerate();
            layers.map(|(layer, kept)| Activations::recall(rows, layer, kept, &places)).collect()
        };
        // Generation does not compute entropies.
        let known = (!batch.entropy)
            .then(|| Ok::<_, Error>(Answers { output: Tensor::new(found.logprobs, &Device::Cpu)?, lse: found.lse }))
            .transpose()?;
        Trace::known(ops, decoder, batch, temperature, activations, found.stream, known).map(Some)
    }
}

impl Activations<Cpu> {
    /// Recorded activations of the rows of a pass.
    fn recall(pass: &Rows<Cpu>, layer: usize, kept: &Arc<Self>, rows: &Arc<Vec<u32>>) -> Self {
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

/// Indices of a batch's rows, and the inputs and results of the head.
#[derive(Default)]
struct Found {
    rows: Vec<u32>,
    stream: Vec<f32>,
    logprobs: Vec<f32>,
    lse: Vec<f32>,
}
