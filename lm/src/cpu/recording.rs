//! Activations recorded during generation, for the update on the completions.
//!
//! Kernels are batch-invariant, so the activations of a completion while it is sampled are, to the bit, those of a
//! forward pass over it. An update with the same weights can begin with the backward pass.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Error, Result, Tensor};
use rehearsal_kernels::math::LogSum;

use super::kept::{Kept, Recalled};
use super::machine::Cpu;
use crate::model::{Batch, Decoder};
use crate::pass::{Activations, Answers, Mlp, Rows, Trace};

/// Rows of one sequence in the recording.
#[derive(Debug, Clone, Default)]
pub struct Trail {
    /// Row of each token but the last, from the first that was not copied from another request's prefix cache.
    rows: Vec<u32>,
    /// Row of each completion token among the recorded inputs of the head.
    head_rows: Vec<u32>,
}

/// A recorded completion.
struct CompletionRecord {
    trail: Trail,
    logprobs: Vec<f32>,
    lse: Vec<LogSum>,
}

/// A recorded prompt: its rows, and its completions by their tokens.
#[derive(Default)]
struct PromptRecord {
    rows: Vec<u32>,
    completions: HashMap<Vec<u32>, CompletionRecord>,
}

/// Records the activations of the passes of one call, one pass after another.
pub struct Recorder {
    /// Most rows to record.
    limit: usize,
    layers: Vec<Activations<Cpu>>,
    /// Rows recorded before the last pass, and how many of them are inputs of the head.
    before: (u32, u32),
    /// Rows recorded so far.
    rows: usize,
    index: Index,
}

/// Finds the rows of prompts and completions.
struct Index {
    /// Temperature that the completions were sampled at.
    temperature: f64,
    hidden: usize,
    /// Inputs of the head: the residual stream before the final norm, `[head rows][hidden]`.
    stream: Vec<f32>,
    /// By the tokens of the prompt.
    prompts: HashMap<Vec<u32>, PromptRecord>,
}

impl Recorder {
    /// Records up to `limit` rows, sampled at `temperature`. Memory is reserved for `expected` rows.
    pub fn new(decoder: &Decoder, limit: usize, expected: usize, temperature: f64) -> Self {
        let (arch, reserved) = (decoder.architecture(), limit.min(expected));
        let hidden = arch.hidden;
        let layer = |layer: usize| {
            let heads = arch.attention(layer);
            let of = |width: usize| Kept::with_capacity(decoder.precision(), reserved * width);
            Activations {
                x: of(hidden),
                qkv: of(heads.width()),
                attended: of(heads.query_width()),
                lse: Vec::with_capacity(reserved * heads.queries),
                projected: arch.sandwich.then(|| of(hidden)),
                middle: of(hidden),
                gate_up: of(Mlp::of(arch).input_width()),
                down: arch.sandwich.then(|| of(hidden)),
            }
        };
        let index = Index { temperature, hidden, stream: Vec::new(), prompts: HashMap::new() };
        Self { limit, layers: (0..arch.layers).map(layer).collect(), before: (0, 0), rows: 0, index }
    }

    /// Whether `rows` more rows are within the limit.
    pub fn fits(&self, rows: usize) -> bool {
        self.rows + rows <= self.limit
    }

    /// Recorded activations of a layer, which a pass appends to.
    pub fn layer(&mut self, layer: usize) -> &mut Activations<Cpu> {
        &mut self.layers[layer]
    }

    /// Ends a pass of `rows` rows; `stream` is the residual stream of those that are inputs of the head.
    pub fn end_pass(&mut self, rows: usize, stream: &[f32]) {
        self.before = (self.rows as u32, (self.index.stream.len() / self.index.hidden) as u32);
        self.rows += rows;
        self.index.stream.extend_from_slice(stream);
    }

    /// Adds a row of the last pass to its sequence; `head_row` is its index among the inputs of the head, if it is one.
    pub fn add_row(&self, trail: &mut Trail, row: usize, head_row: Option<usize>) {
        trail.rows.push(self.before.0 + row as u32);
        trail.head_rows.extend(head_row.map(|row| self.before.1 + row as u32));
    }

    /// Indexes a finished completion by its prompt and tokens.
    pub fn end_completion(&mut self, prompt: &[u32], tokens: &[u32], trail: Trail, logprobs: &[f32], lse: &[LogSum]) {
        let record = self.index.prompts.entry(prompt.to_vec()).or_default();
        if trail.rows.len() + 1 == prompt.len() + tokens.len() {
            record.rows = trail.rows[..prompt.len()].to_vec();
        }
        let completion = CompletionRecord { trail, logprobs: logprobs.to_vec(), lse: lse.to_vec() };
        record.completions.insert(tokens.to_vec(), completion);
    }

    /// Ends the recording.
    pub fn finish(self) -> Recording {
        Recording { layers: self.layers.into_iter().map(Arc::new).collect(), index: Arc::new(self.index) }
    }
}

/// Recorded activations of the completions of a call of [`Generator::generate_recorded`], for an update of the weights
/// that they were sampled from ([`Decoder::forward_recalled`]). Clones share memory.
///
/// [`Generator::generate_recorded`]: crate::generate::Generator::generate_recorded
#[derive(Clone)]
pub struct Recording {
    layers: Vec<Arc<Activations<Cpu>>>,
    index: Arc<Index>,
}

impl Recording {
    /// Log-probabilities of a completion's tokens, if it was recorded and sampled at `temperature`.
    pub fn logprobs(&self, prompt: &[u32], completion: &[u32], temperature: f64) -> Option<&[f32]> {
        let prompt = self.index.prompts.get(prompt).filter(|_| temperature == self.index.temperature)?;
        Some(&prompt.completions.get(completion)?.logprobs)
    }

    /// Whether a whole batch was recorded, sampled at `temperature`.
    pub fn covers(&self, batch: &Batch, temperature: f64) -> bool {
        self.find(batch, temperature).is_some()
    }

    /// The record of a batch, if the whole batch was recorded.
    fn find(&self, batch: &Batch, temperature: f64) -> Option<BatchRecord> {
        if temperature != self.index.temperature || batch.targets.len() != batch.rows.len() {
            return None;
        }
        let hidden = self.index.hidden;
        let mut found = BatchRecord::default();
        let mut spans = batch.spans().windows(2);
        for family in batch.families.iter() {
            let record = self.index.prompts.get(&batch.ids[family.prompt.clone()])?;
            if record.rows.len() != family.prompt.len() {
                return None;
            }
            found.rows.extend(&record.rows);
            for completion in &family.completions {
                let span = spans.next()?;
                let tokens = &batch.targets[span[0]..span[1]];
                let CompletionRecord { trail, logprobs, lse } = record.completions.get(tokens)?;
                found.rows.extend(&trail.rows[trail.rows.len().checked_sub(completion.len())?..]);
                for &row in &trail.head_rows {
                    found.stream.extend(&self.index.stream[row as usize * hidden..][..hidden]);
                }
                found.logprobs.extend(logprobs);
                found.lse.extend(lse);
            }
        }
        (found.rows.len() == batch.tokens() && found.lse.len() == batch.rows.len()).then_some(found)
    }

    /// The forward pass of a batch by its recorded activations; `None` if the recording does not have the whole batch.
    pub(crate) fn trace<'a>(
        self,
        ops: Cpu,
        decoder: &'a Decoder,
        batch: &Batch,
        temperature: f64,
    ) -> Result<Option<Trace<'a, Cpu>>> {
        let Some(found) = self.find(batch, temperature) else { return Ok(None) };
        let places = Arc::new(found.rows);
        let activations = |rows: &Rows<Cpu>| {
            let layers = self.layers.iter().enumerate();
            layers.map(|(layer, kept)| Activations::recall(rows, layer, kept, &places)).collect()
        };
        // Entropies are not recorded.
        let known = (!batch.entropy)
            .then(|| Ok::<_, Error>(Answers { output: Tensor::new(found.logprobs, &Device::Cpu)?, lse: found.lse }))
            .transpose()?;
        Trace::known(ops, decoder, batch, temperature, activations, found.stream, known).map(Some)
    }
}

impl Activations<Cpu> {
    /// Recorded activations of the rows of a pass: row `i` of the pass is row `rows[i]` of the recording.
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

/// Record of a batch: its rows in the recording, and inputs and outputs of the head.
#[derive(Default)]
struct BatchRecord {
    /// Recorded row of each token of the batch.
    rows: Vec<u32>,
    /// Inputs of the head, `[batch.rows()][hidden]`.
    stream: Vec<f32>,
    logprobs: Vec<f32>,
    lse: Vec<LogSum>,
}
