//! What a job tells those who watch it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::state::Evaluation;

/// Something happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The roles are up and the job begins or goes on.
    Started { step: u64, steps: u64, parameters: u64, prompts: usize, skipped: u64 },
    /// A completion is there.
    Rollout { step: u64, done: usize, of: usize },
    /// A step is done.
    Step(Box<StepSummary>),
    /// The held-out prompts were answered.
    Evaluated(Box<Evaluation>),
    /// A checkpoint is durable.
    Checkpoint { step: u64, bytes: u64, took: Duration },
    /// A role died and was started again; the job goes on from its last checkpoint.
    RoleRestarted { role: &'static str, reason: String },
    /// The disk is full: the job waits until there is room.
    DiskFull { message: String },
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

/// One step in numbers. KL, reward and entropy are of the policy before the step's update.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct StepSummary {
    pub step: u64,
    pub reward: f64,
    pub reward_std: f64,
    pub reward_min: f64,
    pub reward_max: f64,
    /// Mean over completions of the summed log-ratio to the reference (k1).
    pub kl: f64,
    /// Mean over tokens of the negative log-probability: an estimate of the entropy.
    pub entropy: f64,
    pub pairs: usize,
    pub ties: usize,
    /// Mean score difference of the pairs.
    pub score_margin: f64,
    pub completion_tokens: f64,
    /// Share of completions cut off by their length.
    pub truncated: f64,
    pub loss: f64,
    pub accuracy: f64,
    pub margin: f64,
    pub chosen_reward: f64,
    pub rejected_reward: f64,
    pub chosen_logprob: f64,
    pub rejected_logprob: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub mismatch_kl: f64,
    pub policy_version: u64,
    pub seconds: Seconds,
    pub generated_tokens: usize,
    pub trained_tokens: usize,
}

/// Where the time of a step went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    pub generate: f64,
    pub reference: f64,
    pub reward: f64,
    pub forward: f64,
    pub backward: f64,
    pub optimizer: f64,
    pub total: f64,
}
