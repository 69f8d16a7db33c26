//! What a job tells those who watch it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rehearsal_store::Preference;
use tokio::sync::broadcast;

use crate::data::Dropped;
use crate::error::ErrorKind;
use crate::summary::{Evaluation, StepSummary};

/// Sends an event to whoever subscribed, and to the program's log.
pub(crate) fn tell(events: &broadcast::Sender<Event>, event: Event) {
    tracing::debug!(event = ?event.without_texts());
    let _ = events.send(event);
}

/// Something happened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// The roles are up and the job begins or goes on.
    Started {
        /// Steps done.
        step: u64,
        /// Steps of the whole job.
        steps: u64,
        /// Parameters of the model.
        parameters: u64,
        /// Rows or prompts to train on.
        rows: usize,
        /// Rows that were left out, by reason.
        dropped: Dropped,
    },
    /// People are to rank answers on this page; the job waits for them.
    PeopleWanted {
        /// URL of the page; it may hold the token.
        url: String,
    },
    /// An evaluation was better than all before it, and its model was written to the folder `best` (`evaluation.best`).
    Best {
        /// Step after which it was made.
        step: u64,
        /// The number by which evaluations are compared.
        measure: &'static str,
        /// Its value.
        value: f64,
    },
    /// The job's viewer is served (`view.listen`).
    ViewerServed {
        /// URL of the page; it may hold the token.
        url: String,
    },
    /// Nodes may join at this address (`nodes.listen`).
    NodesWanted {
        /// The address, with the port that was assigned if the setting's was 0.
        address: std::net::SocketAddr,
    },
    /// Something happened to a node: it joined, left, was not heard of, or is shut out.
    Node {
        /// Its name.
        node: String,
        /// What happened, as a sentence whose subject is the node.
        what: String,
    },
    /// Completions are there.
    Rollout {
        /// Steps done before this one.
        step: u64,
        /// Completions of the step that are there.
        done: usize,
        /// Completions of the step.
        of: usize,
        /// Those that are new.
        completions: Arc<[NewCompletion]>,
    },
    /// The completions of a step have their scores, which are logged.
    Scored {
        /// Steps done before this one.
        step: u64,
        /// The completions that have a score.
        completions: Arc<[ScoredText]>,
    },
    /// A completion got no score and is left out of its group.
    SampleSkipped {
        /// Steps done before this one.
        step: u64,
        /// Place of the completion in the step.
        index: usize,
        /// Row of its prompt in the file.
        row: u64,
        /// Why it has no score.
        reason: String,
    },
    /// What a step compared, as it is in the ledger: completions, scores and the pair that is learned from.
    Preferences {
        /// Steps done before this one.
        step: u64,
        /// One for each prompt.
        preferences: Arc<[Preference]>,
    },
    /// A step is done.
    Step(Box<StepSummary>),
    /// The held-out prompts were answered, or the held-out rows read.
    Evaluated(Box<Evaluation>),
    /// A checkpoint is durable.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Bytes that were written.
        bytes: u64,
        /// Time from the snapshot until it was durable.
        took: Duration,
    },
    /// A role died and was started again; the job goes on from its last checkpoint.
    RoleRestarted {
        /// Name of the role.
        role: &'static str,
        /// Why it died.
        reason: String,
    },
    /// The disk is full: the job waits until there is room.
    DiskFull {
        /// Which file could not be written.
        message: String,
    },
    /// The job has been waiting for long; told again each time that it has waited twice as long.
    Waiting {
        /// Whom it waits for, and for what: `reward: score by people`.
        wait: String,
        /// How long it has waited.
        seconds: f64,
    },
    /// A judge has been asked all that it may be: the job stops with a checkpoint.
    BudgetSpent {
        /// What was spent, and the key that limits it.
        message: String,
    },
    /// This build of the program computes slowly. Told once in a process.
    SlowBuild {
        /// Why, and what to change.
        message: String,
    },
    /// Checkpoints are made after another number of steps than before, to keep to `checkpoint.overhead`.
    CheckpointInterval {
        /// Steps between two.
        steps: u64,
    },
    /// Something was repaired or set aside.
    Repaired {
        /// What was repaired.
        message: String,
    },
    /// The job waits before its next step until it is unpaused.
    Paused {
        /// Steps done.
        step: u64,
    },
    /// The job has ended.
    Finished(Outcome),
    /// The job has failed; its last checkpoint stays.
    Failed {
        /// What kind of thing went wrong.
        kind: ErrorKind,
        /// The error.
        message: String,
    },
}

impl Event {
    /// The event for a log, without prompts and completions.
    pub(crate) fn without_texts(&self) -> Self {
        match self {
            &Self::Rollout { step, done, of, .. } => Self::Rollout { step, done, of, completions: Arc::new([]) },
            &Self::Scored { step, .. } => Self::Scored { step, completions: Arc::new([]) },
            &Self::Preferences { step, .. } => Self::Preferences { step, preferences: Arc::new([]) },
            Self::PeopleWanted { url } => Self::PeopleWanted { url: without_token(url) },
            Self::ViewerServed { url } => Self::ViewerServed { url: without_token(url) },
            other => other.clone(),
        }
    }
}

/// A URL without its fragment, which holds the token.
fn without_token(url: &str) -> String {
    url.split('#').next().unwrap_or_default().into()
}

/// A completion that was just generated.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct NewCompletion {
    /// Place in the step: prompt by prompt, and completion by completion in each.
    pub index: usize,
    /// The prompt as text.
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
    /// The prompt as text.
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
    /// Where the job's results are.
    pub directory: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole job.
    pub steps: u64,
    /// It was asked to stop before its last step; `resume` goes on.
    pub stopped: bool,
    /// Evaluations, in the order of steps.
    pub evaluations: Vec<Evaluation>,
}
