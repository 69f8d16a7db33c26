//! What a step of a trained model minimises: each objective carries its data through the model, micro-batch by
//! micro-batch, and leaves gradients and statistics behind.

mod demonstrations;
mod pairs;
mod rankings;
mod rollouts;
mod values;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor, Var};
use rehearsal_lm::{Batch, Decoder, Forward, Gradients, Recording};
use tokio_util::sync::CancellationToken;

pub use demonstrations::{Demonstrations, Marked};
pub use pairs::{PairTokens, Pairs};
pub use rankings::{Ranking, Rankings};
pub use rollouts::{RolloutTokens, Rollouts};
pub use values::{ValueTokens, Values};

use crate::{Error, Result, Tokens};

/// What a step minimises.
#[derive(Debug, Clone)]
pub enum Objective {
    /// Supervised fine-tuning.
    Demonstrations(Demonstrations),
    /// The DPO family.
    Pairs(Pairs),
    /// PPO, RLOO, GRPO.
    Rollouts(Rollouts),
    /// A reward model's choices.
    Rankings(Rankings),
    /// A critic's returns.
    Values(Values),
}

/// Means by name, as metrics and the history have them.
pub type Stats = BTreeMap<&'static str, f64>;

/// Where the time of a step went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTimes {
    pub forward: Duration,
    pub backward: Duration,
    pub optimizer: Duration,
}

impl StepTimes {
    /// Adds those of another step.
    pub fn add(&mut self, other: &StepTimes) {
        self.forward += other.forward;
        self.backward += other.backward;
        self.optimizer += other.optimizer;
    }
}

/// One pass over a step's data, under way.
pub(crate) struct Pass<'a> {
    pub decoder: &'a Decoder,
    pub temperature: f64,
    /// Tokens of a micro-batch at most; what belongs together is never split.
    pub budget: usize,
    pub cancel: &'a CancellationToken,
    /// What the weights computed of completions that they have just generated.
    pub recording: Option<Recording>,
    pub gradients: Gradients,
    /// The loss of the batch: shares of micro-batches added up.
    pub loss: f64,
    /// Tokens that went through forward and backward.
    pub tokens: usize,
    pub times: StepTimes,
    sums: BTreeMap<&'static str, (f64, f64)>,
}

impl<'a> Pass<'a> {
    pub fn new(decoder: &'a Decoder, temperature: f64, budget: usize, cancel: &'a CancellationToken) -> Self {
        Self {
            decoder,
            temperature,
            budget,
            cancel,
            recording: None,
            gradients: Gradients::default(),
            loss: 0.0,
            tokens: 0,
            times: StepTimes::default(),
            sums: BTreeMap::new(),
        }
    }

    /// Runs an objective to its gradients.
    pub fn run(&mut self, objective: &Objective) -> Result<()> {
        match objective {
            Objective::Demonstrations(o) => o.run(self, 1.0),
            Objective::Pairs(o) => o.run(self),
            Objective::Rollouts(o) => o.run(self),
            Objective::Rankings(o) => o.run(self),
            Objective::Values(o) => o.run(self),
        }
    }

    /// Adds to the sum that a statistic is the mean of.
    fn add(&mut self, name: &'static str, sum: f64, count: usize) {
        let entry = self.sums.entry(name).or_default();
        entry.0 += sum;
        entry.1 += count as f64;
    }

    /// The statistics' means.
    pub fn stats(&self) -> Stats {
        self.sums.iter().map(|(name, (sum, n))| (*name, if *n > 0.0 { sum / n } else { 0.0 })).collect()
    }

    /// [`Pass::micro_step`] on completions, of which what generation computed is used where it was kept. After the `last`
    /// it is given up layer by layer.
    fn completions_step(
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

    /// Forward, loss, backward of one micro-batch: `loss` gives the micro-batch's share of the batch's loss as a
    /// function of the model's output.
    fn micro_step(
        &mut self,
        tokens: usize,
        forward: impl FnOnce(&'a Decoder, f64) -> rehearsal_lm::Result<Forward<'a>>,
        loss: impl FnOnce(&mut Self, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let start = Instant::now();
        let forward = forward(self.decoder, self.temperature)?;
        let output = Var::from_tensor(&forward.output())?;
        let loss = loss(self, &output)?;
        self.loss += loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        self.tokens += tokens;
        self.times.forward += start.elapsed();

        let start = Instant::now();
        let grad = loss.backward()?.remove(&output);
        let grad = grad.ok_or_else(|| rehearsal_lm::Error::NoGradient("(the model's output)".into()))?;
        forward.backward(&grad, &mut self.gradients)?;
        self.times.backward += start.elapsed();
        Ok(())
    }
}

/// Consecutive items of at most `budget` tokens together, and at least one; ends with an error once cancelled.
fn micro_batches<'a, T>(
    items: &'a [T],
    budget: usize,
    cancel: &CancellationToken,
    size: impl Fn(&T) -> usize,
) -> impl Iterator<Item = Result<&'a [T]>> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fitting = rest.iter().take_while(|item| {
            tokens += size(item);
            tokens <= budget
        });
        let n = fitting.count().max(1).min(rest.len());
        let (now, later) = rest.split_at(n);
        rest = later;
        (!now.is_empty()).then(|| if cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(now) })
    })
}

/// Length of a sequence that shares nothing.
fn length(tokens: &Tokens) -> usize {
    tokens.prompt.len() + tokens.completion.len()
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.to_vec1()?)
}

fn total(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sum_all()?.to_scalar()?)
}

/// Values beside the model's output, in its type.
fn column(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::new(values, like.device())?.to_dtype(like.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_fill_the_budget_and_keep_the_order() {
        let sizes = |items: &[usize], budget: usize| -> Vec<usize> {
            let cancel = CancellationToken::new();
            micro_batches(items, budget, &cancel, |n| *n).map(|b| b.unwrap().len()).collect()
        };
        assert_eq!(sizes(&[40, 50, 30, 200, 10, 90], 100), [2, 1, 1, 2]);
        assert_eq!(sizes(&[40, 50], usize::MAX), [2]);
        assert_eq!(sizes(&[], 100), [0usize; 0]);
    }
}
