//! What a job tells those who watch it.

use std::path::PathBuf;
use std::time::Duration;

use crate::data::Dropped;
use crate::summary::{Evaluation, StepSummary};

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
