//! What the leaves of a step add up to: gradients, loss and statistics.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rehearsal_lm::add_gradients;

use crate::Result;
use crate::objective::{Pass, Stats, StepTimes, Sums};

/// Sums over one leaf of a step, or several.
#[derive(Default)]
pub(crate) struct LeafSum {
    /// Gradients of the trained variables by name; `None` where the leaves hold no data.
    pub gradients: Option<BTreeMap<String, Tensor>>,
    /// Share of the step's loss.
    pub loss: f64,
    /// Tokens that went through forward and backward passes.
    pub tokens: usize,
    /// Wall time by phase.
    pub times: StepTimes,
    sums: Sums,
}

impl LeafSum {
    /// What a pass has accumulated, without its gradients.
    pub fn of(pass: &Pass<'_>) -> Self {
        let (loss, tokens, times) = (pass.loss(), pass.tokens(), pass.times());
        Self { gradients: None, loss, tokens, times, sums: pass.sums().clone() }
    }

    /// A sum whose gradients are in another process.
    pub fn received(loss: f64, tokens: usize, times: StepTimes, stats: Vec<(String, f64, f64)>) -> Self {
        Self { gradients: None, loss, tokens, times, sums: Sums::of_names(stats) }
    }

    /// Sum and count of each statistic by name.
    pub fn named_sums(&self) -> Vec<(String, f64, f64)> {
        self.sums.named()
    }

    /// The sum without its gradients.
    pub fn without_gradients(&self) -> Self {
        Self { gradients: None, sums: self.sums.clone(), ..*self }
    }

    /// The sum of two; that of gradients takes the memory of the first.
    pub fn add(mut self, other: Self) -> Result<Self> {
        self.gradients = match (self.gradients, other.gradients) {
            (Some(a), Some(b)) => Some(add_gradients(a, &b)?),
            (a, b) => a.or(b),
        };
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.times.add(&other.times);
        self.sums.add(&other.sums);
        Ok(self)
    }

    /// Means of the objective's statistics.
    pub fn stats(&self) -> Stats {
        self.sums.means()
    }
}
