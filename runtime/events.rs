//! What a job tells those who watch it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::data::Dropped;
use crate::state::Evaluation;

/// Something happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The roles are up and the job begins or goes on.
    Started { step: u64, steps: u64, parameters: u64, rows: usize, dropped: Dropped },
    /// People are to rank answers on this page; the job waits for them.
    PeopleWanted { url: String },
    /// A completion is there.
    Rollout { step: u64, done: usize, of: usize },
    /// A step is done.
    Step(Box<StepSummary>),
    /// The held-out prompts were answered, or the held-out rows read.
    Evaluated(Box<Evaluation>),
    /// A checkpoint is durable.
    Checkpoint { step: u64, bytes: u64, took: Duration },
    /// A role died and was started again; the job goes on from its last checkpoint.
    RoleRestarted { role: &'static str, reason: String },
    /// The disk is full: the job waits until there is room.
    DiskFull { message: String },
    /// A judge has been asked all that it may be: the job stops with a checkpoint.
    BudgetSpent { message: String },
    /// Something was repaired or set aside.
    Repaired { message: String },
    /// The job has ended.
    Finished(Outcome),
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub directory: PathBuf,
    pub step: u64,
    pub steps: u64,
    /// It was asked to stop before its last step; `resume` goes on.
    pub stopped: bool,
    pub evaluations: Vec<Evaluation>,
}

/// One step in numbers. What is measured on rollouts (reward, KL, entropy) is of the policy before the step's update.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct StepSummary {
    pub step: u64,
    /// Updates the trained model has seen.
    pub version: u64,
    pub loss: f64,
    /// Global norm of the gradients before clipping.
    pub gradient_norm: f64,
    pub learning_rate: f64,
    pub generated_tokens: usize,
    /// Tokens that went through forward and backward.
    pub trained_tokens: usize,
    /// What else the algorithm has to say, under the names of its metrics (`docs/metrics.md`).
    #[serde(flatten)]
    pub stats: BTreeMap<&'static str, f64>,
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
    pub generate: f64,
    pub reference: f64,
    pub reward: f64,
    pub critic: f64,
    pub forward: f64,
    pub backward: f64,
    pub optimizer: f64,
    pub total: f64,
}
