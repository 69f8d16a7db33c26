//! The forward and backward passes of one optimizer step.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var};
use rehearsal_lm::{Batch, Decoder, Forward, Gradients, Recording};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::micro_batch::micro_batches;
use crate::{Error, Result};

/// Means of a step's statistics by name.
pub type Stats = BTreeMap<&'static str, f64>;

/// Sum and count of each statistic.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sums(BTreeMap<&'static str, (f64, f64)>);

impl Sums {
    /// Adds to a statistic.
    fn note(&mut self, name: &'static str, sum: f64, count: f64) {
        let entry = self.0.entry(name).or_default();
        entry.0 += sum;
        entry.1 += count;
    }

    /// Adds the sums and counts of another part of the step.
    pub fn add(&mut self, other: &Self) {
        other.0.iter().for_each(|(name, (sum, count))| self.note(name, *sum, *count));
    }

    /// The sums and counts by name.
    pub fn named(&self) -> Vec<(String, f64, f64)> {
        self.0.iter().map(|(name, (sum, count))| (name.to_string(), *sum, *count)).collect()
    }

    /// Sums and counts that another process has named.
    pub fn of_names(named: Vec<(String, f64, f64)>) -> Self {
        let mut sums = Self::default();
        named.into_iter().for_each(|(name, sum, count)| sums.note(interned(name), sum, count));
        sums
    }

    /// The statistics' means, or 0 where nothing was counted.
    pub fn means(&self) -> Stats {
        self.0.iter().map(|(name, (sum, n))| (*name, if *n > 0.0 { sum / n } else { 0.0 })).collect()
    }
}

/// A name for the life of the process: objectives have few names, each of which is kept once.
fn interned(name: String) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    match names.get(name.as_str()) {
        Some(known) => known,
        None => {
            let kept: &'static str = name.leak();
            names.insert(kept);
            kept
        }
    }
}

/// A leaf: one of the parts that a step's data are cut into. Gradients are summed leaf by leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// Which one, from 0.
    pub index: usize,
    /// How many there are; 1 or more.
    pub count: usize,
}

impl Leaf {
    /// The leaf's range of `items` items, when leaves get as many each.
    pub fn of(self, items: usize) -> Range<usize> {
        self.index * items / self.count..(self.index + 1) * items / self.count
    }
}

/// How the items of a step are cut into leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cut {
    /// Into ranges of as many items each.
    #[default]
    Items,
    /// Into ranges of as many prompts each, so that a member of a group learns from the completions that it sampled.
    Prompts {
        /// Prompts of the step.
        prompts: usize,
        /// The prompt of each item, in ascending order.
        of: Vec<u32>,
    },
}

impl Cut {
    /// A leaf's range of `items` items.
    pub fn range(&self, leaf: Leaf, items: usize) -> Range<usize> {
        match self {
            Self::Items => leaf.of(items),
            Self::Prompts { prompts, of } => {
                let prompts = leaf.of(*prompts);
                let before = |prompt: usize| of.partition_point(|p| (*p as usize) < prompt).min(items);
                before(prompts.start)..before(prompts.end)
            }
        }
    }
}

/// Wall time of the phases of an optimizer step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTimes {
    /// Forward passes and losses.
    pub forward: Duration,
    /// Backward passes, until the gradients are complete.
    pub backward: Duration,
    /// Gradient clipping, the optimizer's update, merging of adapters and weight averaging.
    pub optimizer: Duration,
}

impl StepTimes {
    /// All phases together.
    pub fn total(&self) -> Duration {
        self.forward + self.backward + self.optimizer
    }

    /// Adds the times of another step.
    pub fn add(&mut self, other: &StepTimes) {
        self.forward += other.forward;
        self.backward += other.backward;
        self.optimizer += other.optimizer;
    }
}

/// Gives an [`Objective`](crate::Objective) access to the model, and accumulates loss, gradients and statistics over
/// the micro-batches of one leaf of an optimizer step.
pub struct Pass<'a> {
    decoder: &'a Decoder,
    leaf: Leaf,
    /// Whether the objective has asked for the leaf's part of its data.
    cut: Cell<bool>,
    temperature: f64,
    micro_batch_tokens: usize,
    cancel: &'a CancellationToken,
    /// Activations that generation kept of completions sampled with the current weights.
    recording: Option<Recording>,
    pub(crate) gradients: Gradients,
    loss: f64,
    tokens: usize,
    times: StepTimes,
    sums: Sums,
}

impl<'a> Pass<'a> {
    /// Starts the passes of a leaf. Without a `recording`, every forward pass is computed.
    pub(crate) fn new(
        decoder: &'a Decoder,
        leaf: Leaf,
        temperature: f64,
        micro_batch_tokens: usize,
        cancel: &'a CancellationToken,
        recording: Option<Recording>,
    ) -> Self {
        Self {
            decoder,
            leaf,
            cut: Cell::new(false),
            temperature,
            micro_batch_tokens,
            cancel,
            recording,
            gradients: Gradients::default(),
            loss: 0.0,
            tokens: 0,
            times: StepTimes::default(),
            sums: Sums::default(),
        }
    }

    /// The model that is trained.
    pub fn decoder(&self) -> &'a Decoder {
        self.decoder
    }

    /// The temperature at which the step computes log-probabilities, above 0: the one that completions were sampled at.
    pub fn temperature(&self) -> f64 {
        self.temperature
    }

    /// Whether the step was cancelled. [`Pass::micro_batches`] checks it before each micro-batch.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// The leaf that is computed.
    pub fn leaf(&self) -> Leaf {
        self.leaf
    }

    /// Splits the leaf's part of `items` into micro-batches: consecutive items that together have at most the configured
    /// number of tokens (`size` gives the tokens of one item), and at least one item. An item is never split. `items` are
    /// those of the whole step, of which leaves get as many each.
    ///
    /// The iterator yields [`Error::Cancelled`] in place of a micro-batch once the step is cancelled.
    pub fn micro_batches<'i, T, F>(
        &self,
        items: &'i [T],
        size: F,
    ) -> impl Iterator<Item = Result<&'i [T]>> + use<'a, 'i, T, F>
    where
        F: Fn(&T) -> usize,
    {
        self.micro_batches_of(items, &Cut::Items, size)
    }

    /// [`Pass::micro_batches`] of items that are cut into leaves in another way.
    pub fn micro_batches_of<'i, T, F>(
        &self,
        items: &'i [T],
        cut: &Cut,
        size: F,
    ) -> impl Iterator<Item = Result<&'i [T]>> + use<'a, 'i, T, F>
    where
        F: Fn(&T) -> usize,
    {
        self.cut.set(true);
        let (items, cancel) = (&items[cut.range(self.leaf, items.len())], self.cancel);
        let checked = move |batch| if cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(batch) };
        micro_batches(items, self.micro_batch_tokens, move |_, item| size(item)).map(checked)
    }

    /// Adds to a statistic of the leaf's micro-batches, whose value for the step is the sum of all `sum`s divided by the sum of all `count`s, or 0
    /// where nothing was counted.
    pub fn add(&mut self, name: &'static str, sum: f64, count: usize) {
        self.sums.note(name, sum, count as f64);
    }

    /// [`Pass::micro_step`] on log-probabilities of completions, with the activations that generation kept of them where
    /// there are any. Results are the same bits either way; only the forward pass is saved.
    ///
    /// `loss` gets the output of [`Decoder::forward`] at the step's temperature: `[batch.scored()]`, and as many
    /// entropies behind them if the batch asks for entropies. `last` says that this is the last call of the step, after
    /// which the kept activations are freed layer by layer.
    pub fn completions_step(
        &mut self,
        batch: &Batch,
        last: bool,
        loss: impl FnOnce(&mut Self, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let recording = if last { self.recording.take() } else { self.recording.clone() };
        let forward = |model: &'a Decoder, temperature| match recording {
            Some(recording) => model.forward_recalled(batch, temperature, recording),
            None => model.forward(batch, temperature),
        };
        self.micro_step(batch.tokens(), forward, loss)
    }

    /// Runs forward pass, loss and backward pass of one micro-batch of `tokens` tokens.
    ///
    /// `forward` is given the model and the step's temperature and calls [`Decoder::forward`] or
    /// [`Decoder::forward_values`]. `loss` is given the output of the forward pass as a variable, f32 on the CPU,
    /// `[batch.scored()]` or `[batch.rows()]`; it returns the micro-batch's share of the step's loss, a scalar
    /// that depends on that variable.
    ///
    /// # Errors
    ///
    /// [`rehearsal_lm::Error::NoGradient`] if the returned loss does not depend on the model's output,
    /// [`Error::Data`] if a step has several leaves and the data were not taken from [`Pass::micro_batches`], and the
    /// errors of `forward` and `loss`.
    pub fn micro_step(
        &mut self,
        tokens: usize,
        forward: impl FnOnce(&'a Decoder, f64) -> rehearsal_lm::Result<Forward<'a>>,
        loss: impl FnOnce(&mut Self, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        if self.leaf.count > 1 && !self.cut.get() {
            let leaves = self.leaf.count;
            return Err(Error::Data(format!(
                "the objective does not take its data from `Pass::micro_batches`, which a step in {leaves} leaves needs"
            )));
        }
        let start = Instant::now();
        let forward = forward(self.decoder, self.temperature)?;
        // The loss is some arithmetic on a few numbers, each operation of which would be a launch on a GPU.
        let output = Var::from_tensor(&forward.output().to_device(&Device::Cpu)?)?;
        let loss = loss(self, &output)?;
        self.loss += loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        self.tokens += tokens;
        self.times.forward += start.elapsed();

        let start = Instant::now();
        let grad = loss.backward()?.remove(&output);
        let grad = grad.ok_or_else(|| rehearsal_lm::Error::NoGradient("(the model's output)".into()))?;
        forward.backward(&grad.to_device(self.decoder.device())?, &mut self.gradients)?;
        self.times.backward += start.elapsed();
        Ok(())
    }

    /// The loss so far: the sum of the micro-batches' shares.
    pub fn loss(&self) -> f64 {
        self.loss
    }

    /// Tokens that went through forward and backward passes so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Wall time of the forward and backward passes so far.
    pub fn times(&self) -> StepTimes {
        self.times
    }

    /// The statistics' means so far.
    pub fn stats(&self) -> Stats {
        self.sums.means()
    }

    pub(crate) fn sums(&self) -> &Sums {
        &self.sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::tiny_model;

    #[test]
    fn a_cancelled_step_has_no_more_micro_batches() {
        let decoder = tiny_model().trainable(&candle_core::Device::Cpu, DType::F32).unwrap();
        let cancel = CancellationToken::new();
        let pass = Pass::new(&decoder, Leaf { index: 0, count: 1 }, 1.0, 1, &cancel, None);
        let mut batches = pass.micro_batches(&[1, 1], |n| *n);
        assert!(batches.next().unwrap().is_ok());
        cancel.cancel();
        assert!(matches!(batches.next(), Some(Err(Error::Cancelled))));
    }
}
