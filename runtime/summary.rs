//! Numbers of steps, evaluations and whole jobs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One step in numbers. What is measured on rollouts (reward, KL, entropy) is of the policy before the step's update.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct StepSummary {
    /// The step, from 1.
    pub step: u64,
    /// Updates the trained model has seen.
    pub version: u64,
    /// Loss of the last update.
    pub loss: f64,
    /// Global norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Tokens that were sampled.
    pub generated_tokens: usize,
    /// Tokens that went through forward and backward.
    pub trained_tokens: usize,
    /// What else the algorithm has to say, under the names of its metrics (`docs/metrics.md`).
    #[serde(flatten)]
    pub stats: BTreeMap<&'static str, f64>,
    /// Where the time went.
    pub seconds: Seconds,
}

impl StepSummary {
    /// A number by the name of its metric.
    pub fn stat(&self, name: &str) -> Option<f64> {
        self.stats.get(name).copied()
    }
}

/// Where the time of a step went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Sampling of completions.
    pub generate: f64,
    /// Log-probabilities under the policy before the update.
    pub policy: f64,
    /// Log-probabilities under the reference.
    pub reference: f64,
    /// Scores.
    pub reward: f64,
    /// Values of the critic before the update.
    pub critic: f64,
    /// Forward passes of updates.
    pub forward: f64,
    /// Backward passes of updates.
    pub backward: f64,
    /// Optimizer's updates.
    pub optimizer: f64,
    /// The whole step.
    pub total: f64,
}

/// Counts since the job began, as exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Steps.
    pub steps: u64,
    /// Updates of the trained model.
    pub updates: u64,
    /// Completions.
    pub rollouts: u64,
    /// Tokens that were sampled.
    pub generated_tokens: u64,
    /// Tokens that went through forward and backward.
    pub trained_tokens: u64,
    /// Preference pairs.
    pub pairs: u64,
    /// Prompts whose completions were all scored alike, so that they gave no pair.
    pub ties: u64,
    /// Completions that reached the length limit.
    pub truncated: u64,
    /// Completions that were too old to be learned from.
    pub stale: u64,
}

/// How the model did on what is kept apart: held-out prompts it answered, or held-out rows it read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Step after which it was made; 0 before the first.
    pub step: u64,
    /// Numbers by name: `reward`, `kl`, `tokens` of answers; `loss`, `accuracy`, `margin` of rows.
    pub stats: BTreeMap<String, f64>,
    /// Some of the answers.
    pub samples: Vec<Answer>,
}

impl Evaluation {
    /// An evaluation on held-out rows.
    pub fn of_rows<const N: usize>(step: u64, stats: [(&str, f64); N]) -> Self {
        let stats = stats.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        Self { step, stats, samples: Vec::new() }
    }

    /// A number by name.
    pub fn stat(&self, name: &str) -> Option<f64> {
        self.stats.get(name).copied()
    }

    /// Mean score of the answers; 0 where there are none.
    pub fn reward(&self) -> f64 {
        self.stat("reward").unwrap_or_default()
    }

    /// Mean over answers of the summed log-ratio to the reference (k1); 0 where there are none.
    pub fn kl(&self) -> f64 {
        self.stat("kl").unwrap_or_default()
    }
}

/// One answer to look at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Text of the prompt.
    pub prompt: String,
    /// Text of the answer.
    pub completion: String,
    /// Score of the answer.
    pub score: f64,
}
