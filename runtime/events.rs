//! What a job tells those who watch it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rehearsal_store::Preference;

use crate::data::Dropped;
use crate::error::ErrorKind;
use crate::summary::{Evaluation, StepSummary};

/// Something happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// The roles are up and the job begins or goes on.
    Started { step: u64, steps: u64, parameters: u64, rows: usize, dropped: Dropped },
    /// People are to rank answers on this page; the job waits for them.
    PeopleWanted { url: String },
    /// Completions are there: `done` of the step's `of`, of which `completions` are new.
    Rollout { step: u64, done: usize, of: usize, completions: Arc<[NewCompletion]> },
    /// The completions of a step have their scores, which are logged.
    Scored { step: u64, completions: Arc<[ScoredText]> },
    /// A completion got no score and is left out of its group. `index` is its place in the step.
    SampleSkipped { step: u64, index: usize, row: u64, reason: String },
    /// What a step compared, as it is in the ledger: completions, scores and the pair that is learned from.
    Preferences { step: u64, preferences: Arc<[Preference]> },
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
    /// This build of the program computes slowly, for the reason that `message` gives. Told once in a process.
    SlowBuild { message: String },
    /// Something was repaired or set aside.
    Repaired { message: String },
    /// The job waits before its next step until it is unpaused.
    Paused { step: u64 },
    /// The job has ended.
    Finished(Outcome),
    /// The job has failed; its last checkpoint stays.
    Failed { kind: ErrorKind, message: String },
}

impl Event {
    /// The event for a log, without prompts and completions.
    pub(crate) fn without_texts(&self) -> Self {
        match self {
            &Self::Rollout { step, done, of, .. } => Self::Rollout { step, done, of, completions: Arc::new([]) },
            &Self::Scored { step, .. } => Self::Scored { step, completions: Arc::new([]) },
            &Self::Preferences { step, .. } => Self::Preferences { step, preferences: Arc::new([]) },
            other => other.clone(),
        }
    }
}

/// A completion that was just generated.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct NewCompletion {
    /// Place in the step: prompt by prompt, and completion by completion in each.
    pub index: usize,
    pub prompt: String,
    /// Without special tokens and stop strings.
    pub completion: String,
    /// Length in tokens.
    pub tokens: usize,
}

/// A completion with its score.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ScoredText {
    /// Place in the step: prompt by prompt, and completion by completion in each.
    pub index: usize,
    pub prompt: String,
    /// Without special tokens and stop strings.
    pub completion: String,
    /// Higher is better.
    pub score: f64,
    /// Explanation given by the scorer; may be empty.
    pub reason: String,
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
