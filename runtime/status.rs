//! How far a job is: what a running job publishes, and keeps in `status.json` for when it does not run.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::Dropped;
use crate::memory::MemoryBudget;
use crate::summary::Counters;

/// Name of the file in a job's directory.
pub const STATUS_FILE: &str = "status.json";

/// How far a job is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct JobStatus {
    /// Id of the process that runs the job, or that ran it last.
    pub process: u32,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole job.
    pub steps: u64,
    /// Step of the newest durable checkpoint.
    pub checkpoint: Option<u64>,
    /// Unix time in milliseconds when this was written.
    pub time_ms: u64,
    /// The last step's line of `history.jsonl`; null before the first step.
    pub last: Value,
    /// Counts since the job began.
    pub counters: Counters,
    /// For each evaluation its `step`, and its numbers by name.
    pub evaluations: Vec<Value>,
    /// Name of the algorithm.
    pub algorithm: String,
    /// Rows of the data that were left out.
    pub dropped: Dropped,
    /// Memory of the process.
    pub memory: MemoryUse,
    /// Whether it is at its end, and its model written. Jobs that ended under older builds do not say so: they have all their
    /// steps.
    #[serde(default)]
    pub done: bool,
    /// Whether it waits for its handle, or who else paused it, to let it go on.
    #[serde(default)]
    pub paused: bool,
    /// What a running job has been waiting for for longer than `limits.notice_seconds`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<Waiting>,
}

impl JobStatus {
    /// Whether the job is at its end.
    pub fn is_done(&self) -> bool {
        self.done || (self.steps > 0 && self.step >= self.steps)
    }
}

/// A long wait.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    /// Whom the job waits for, and for what: `reward: score by people`.
    pub wait: String,
    /// How long it has waited.
    pub seconds: f64,
}

/// Bytes of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// What the configuration predicts; `None` if a role is not on the CPU.
    pub predicted: Option<MemoryBudget>,
    /// The most that the process has held so far; `None` if the system does not tell.
    pub measured_peak: Option<u64>,
}
