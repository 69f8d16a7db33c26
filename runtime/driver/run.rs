//! A running job: its roles, its state, and the verbs that steps are made of.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use candle_core::DType;
use rehearsal_actors::{CriticHandle, Objective, PolicyHandle, StepReport, UpdateBatch};
use rehearsal_lm::Checkpoint;
use rehearsal_store::Preference;
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::checkpoints::Writing;
use super::command::Command;
use super::interval::Interval;
use super::journal::{Journal, Log};
use super::roles::{Roles, TrainedModel};
use super::state::JobState;
use super::stats::Step;
use crate::data::Dropped;
use crate::error::{Error, Result};
use crate::events::{Event, tell};
use crate::memory::{self, MemoryBudget};
use crate::metrics::Meters;
use crate::metrics::table::{process, rollouts};
use crate::readiness::Readiness;
use crate::settings::Common;
use crate::status::{JobStatus, MemoryUse};
use crate::summary::Evaluation;

/// The model of the best evaluation, in the job's directory (`evaluation.best`).
pub const BEST_FOLDER: &str = "best";

/// Evaluations in `status.json`: the newest. All are in `evaluations.jsonl`.
const EVALUATIONS_SHOWN: usize = 100;

/// An evaluation as a line of JSON.
fn row(evaluation: &Evaluation) -> Value {
    let mut row = json!(evaluation.stats);
    row["step"] = json!(evaluation.step);
    row
}

/// A running job.
pub struct Run {
    /// The sections that every job has.
    pub common: Common,
    /// Name of the algorithm.
    pub algorithm: &'static str,
    /// The state that checkpoints hold.
    pub state: JobState,
    /// The model that is trained, as it was at the start.
    pub model: Arc<Checkpoint>,
    /// Cancelled when the job is asked to stop.
    pub cancel: CancellationToken,
    pub(crate) roles: Roles,
    pub(super) journal: Journal,
    pub(super) dropped: Dropped,
    pub(super) rows: usize,
    pub(super) meters: Arc<Meters>,
    /// Set while the state is restored and steps run.
    pub(super) readiness: Readiness,
    pub(super) events: broadcast::Sender<Event>,
    /// What the job's handles ask for between two steps.
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
    pub(super) status: watch::Sender<JobStatus>,
    /// Whether the weights have been updated since the state was last whole: a checkpoint must not be made of them.
    pub(super) mid_step: bool,
    /// Completions of the step that are left out because they have no score.
    pub(super) skipped: usize,
    /// Updates between the version that sampled the step's completions and the one that learns from them, where a schedule
    /// sets it.
    pub(super) staleness: Option<u64>,
    /// Restarts of roles before the state was last restored; a role that is restarted later has to be restored.
    pub(super) restarts_restored: u32,
    /// Step of the newest durable checkpoint.
    pub(super) saved: Option<u64>,
    /// When checkpoints are due.
    pub(super) interval: Interval,
    /// Time that the job waited for a checkpoint to begin, since the last step.
    pub(super) begun: Duration,
    /// The checkpoint that is being written.
    pub(super) writing: Option<Writing>,
    /// The last step's line of the history.
    pub(super) last: Value,
    /// Whether the job is at its end, and its model written.
    pub(super) done: bool,
    /// Where the memory should go.
    pub(super) budget: Option<MemoryBudget>,
    /// Held until the job ends, such as servers.
    pub(super) _guards: Vec<Box<dyn Any + Send + Sync>>,
}

impl Run {
    /// Sends an event to whoever subscribed.
    pub fn tell(&self, event: Event) {
        tell(&self.events, event);
    }

    /// The policy that the job trains; `None` if it trains a reward model.
    pub(crate) fn policy(&self) -> Option<PolicyHandle> {
        match self.roles.trained.first() {
            Some(TrainedModel::Policy(policy)) => Some(policy.clone()),
            _ => None,
        }
    }

    /// Updates that the trained model has had: the version of the weights that a step generates with.
    pub fn version(&self) -> u64 {
        self.state.counters.updates
    }

    /// Learning rate of the current step.
    pub fn learning_rate(&self) -> f64 {
        self.common.schedule().rate(self.state.step)
    }

    /// One update of the model that the job trains. `temperature` divides its logits. A loss or gradient that is not
    /// finite ends the job: the batch is written out, and the last checkpoint stays.
    pub async fn learn(
        &mut self,
        objective: impl Objective,
        learning_rate: f64,
        temperature: f64,
    ) -> Result<StepReport> {
        let trained = || Error::Internal("the algorithm has started no model to train".into());
        let model = self.roles.trained.first().cloned().ok_or_else(trained)?;
        self.update(model, Arc::new(objective), learning_rate, temperature).await
    }

    /// One update of a critic, as [`Run::learn`].
    pub async fn learn_critic(
        &mut self,
        critic: &CriticHandle,
        objective: impl Objective,
        learning_rate: f64,
    ) -> Result<StepReport> {
        self.update(TrainedModel::Critic(critic.clone()), Arc::new(objective), learning_rate, 1.0).await
    }

    async fn update(
        &mut self,
        model: TrainedModel,
        objective: Arc<dyn Objective>,
        learning_rate: f64,
        temperature: f64,
    ) -> Result<StepReport> {
        self.settle().await?;
        let batch = UpdateBatch { objective: objective.clone(), learning_rate, temperature };
        match model.step(batch, self.cancel.clone()).await {
            Ok(report) => {
                self.mid_step = true;
                Ok(report)
            }
            Err(error @ (rehearsal_actors::Error::NotFinite { .. } | rehearsal_actors::Error::Diverged)) => {
                let report = format!("{error}\nlearning rate {learning_rate}\n{objective:#?}\n");
                let path = self.journal.offending_batch(self.state.step, report).await?;
                Err(Error::Offending { path, error: Box::new(error.into()) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Writes comparisons of the current step into the preference ledger, and tells of them. A record with the step and
    /// index of one that is there replaces it.
    pub async fn log_preferences(&self, preferences: Vec<Preference>) -> Result<()> {
        self.roles.archivist.log_preferences(preferences.clone()).await?;
        self.tell(Event::Preferences { step: self.state.step, preferences: preferences.into() });
        Ok(())
    }

    /// Counts a step, and makes it visible: metrics, history, status, event.
    pub(super) async fn finish_step(&mut self, step: Step) -> Result<()> {
        self.mid_step = false;
        let Step { mut summary, drawn, completions } = step;
        self.state.count(&summary, drawn, completions);
        summary.step = self.state.step;
        let skipped = std::mem::take(&mut self.skipped);
        self.meters.set(rollouts::SKIPPED, skipped as f64);
        if skipped > 0 {
            summary.stats.insert("skipped", skipped as f64);
        }
        if let Some(updates) = self.staleness.take() {
            summary.stats.insert("staleness", updates as f64);
        }
        self.publish();
        self.meters.step(&summary)?;
        self.last = serde_json::to_value(&summary).map_err(|e| Error::Internal(e.to_string()))?;
        self.journal.append(Log::History, &self.last).await?;
        self.write_status().await?;
        self.tell(Event::Step(Box::new(summary)));
        Ok(())
    }

    /// Notes an evaluation, and makes it visible.
    pub(super) async fn finish_evaluation(&mut self, evaluation: Evaluation) -> Result<()> {
        self.meters.evaluation(&evaluation)?;
        if let Some(measure) = self.common.evaluation.best {
            let name = measure.name();
            let missing =
                || Error::Usage(format!("`evaluation.best` = \"{name}\" is no number of this job's evaluations"));
            let value = evaluation.stat(name).ok_or_else(missing)?;
            if self.state.compare(measure, evaluation.step, value) {
                self.write_model(self.common.job.directory.join(BEST_FOLDER), DType::F32, None).await?;
                self.tell(Event::Best { step: evaluation.step, measure: name, value });
            }
        }
        let mut line = row(&evaluation);
        line["samples"] = json!(evaluation.samples);
        self.journal.append(Log::Evaluations, &line).await?;
        self.state.evaluated(evaluation.clone());
        self.tell(Event::Evaluated(Box::new(evaluation)));
        self.write_status().await
    }

    /// Exports counters and the load of the roles.
    pub(super) fn publish(&self) {
        self.meters.counters(&self.state.counters);
        self.meters.set(process::JOB_STEPS, self.common.job.steps as f64);
        self.meters.set(process::DROPPED_ROWS, self.dropped.total() as f64);
        for (stat, bytes) in [("current", memory::measured()), ("peak", memory::measured_peak())] {
            if let Some(bytes) = bytes {
                self.meters.set_series(process::MEMORY_BYTES, stat, bytes as f64);
            }
        }
        for (purpose, bytes) in self.budget.iter().flat_map(MemoryBudget::by_purpose) {
            self.meters.set_series(process::MEMORY_PREDICTED_BYTES, purpose, bytes as f64);
        }
        for (role, busy, depth) in self.roles.loads() {
            self.meters.set_series(process::ROLE_BUSY_SECONDS, role, busy);
            self.meters.set_series(process::MAILBOX_DEPTH, role, depth as f64);
        }
        if let Some(nodes) = &self.roles.nodes {
            let load = nodes.load();
            self.meters.set(process::NODES, load.nodes as f64);
            self.meters.set_series(process::NODE_COMPLETIONS, "counted", load.counted as f64);
            self.meters.set_series(process::NODE_COMPLETIONS, "again", load.again as f64);
            self.meters.set(process::NODE_BYTES, load.bytes as f64);
        }
        if let Some(evaluation) = self.state.evaluations.last() {
            // Numbers that an earlier version kept and this one has no metric for are not exported.
            let _ = self.meters.evaluation(evaluation);
        }
    }

    /// Publishes how far the job is: to its handles, and to `status.json` for when it does not run.
    pub(super) async fn write_status(&self) -> Result<()> {
        let mut status = JobStatus {
            process: std::process::id(),
            step: self.state.step,
            steps: self.common.job.steps,
            checkpoint: self.saved,
            time_ms: crate::time::now_ms(),
            last: self.last.clone(),
            counters: self.state.counters,
            evaluations: self.state.evaluations.iter().rev().take(EVALUATIONS_SHOWN).rev().map(row).collect(),
            algorithm: self.algorithm.into(),
            dropped: self.dropped.clone(),
            memory: MemoryUse { predicted: self.budget, measured_peak: None },
            done: self.done,
            paused: false,
            waiting: Vec::new(),
        };
        let publish = self.status.clone();
        let status = move || {
            status.memory.measured_peak = memory::measured_peak();
            publish.send_replace(status.clone());
            status
        };
        self.journal.status(status).await
    }
}
