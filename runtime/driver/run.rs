//! A running job: its roles, its state, and the verbs that steps are made of.

use std::any::Any;
use std::sync::Arc;

use rehearsal_actors::{CriticHandle, Objective, StepReport, UpdateBatch};
use rehearsal_lm::Checkpoint;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::checkpoints::Writing;
use super::journal::Journal;
use super::roles::{Roles, TrainedModel};
use super::state::JobState;
use super::stats::Step;
use crate::data::Dropped;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::exporter::Readiness;
use crate::memory::{self, MemoryBudget};
use crate::metrics::Meters;
use crate::metrics::table::process;
use crate::settings::Common;
use crate::summary::Evaluation;

/// A running job.
pub struct Run {
    pub common: Common,
    /// Name of the algorithm.
    pub algorithm: &'static str,
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
    /// Whether the weights have been updated since the state was last whole: a checkpoint must not be made of them.
    pub(super) mid_step: bool,
    /// Step of the newest durable checkpoint.
    pub(super) saved: Option<u64>,
    /// The checkpoint that is being written.
    pub(super) writing: Option<Writing>,
    /// The last step's line of the history.
    pub(super) last: Value,
    /// Where the memory should go.
    pub(super) budget: Option<MemoryBudget>,
    /// Held until the job ends, such as servers.
    pub(super) _guards: Vec<Box<dyn Any + Send + Sync>>,
}

impl Run {
    /// Sends an event to whoever subscribed.
    pub fn tell(&self, event: Event) {
        tracing::debug!(?event);
        let _ = self.events.send(event);
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
            Err(error @ rehearsal_actors::Error::NotFinite { .. }) => {
                let report = format!("{error}\nlearning rate {learning_rate}\n{objective:#?}\n");
                let path = self.journal.offending_batch(self.state.step, report).await?;
                Err(Error::Offending { path, error: Box::new(error.into()) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Counts a step, and makes it visible: metrics, history, status, event.
    pub(super) async fn finish_step(&mut self, step: Step) -> Result<()> {
        self.mid_step = false;
        let Step { mut summary, drawn, completions } = step;
        self.state.count(&summary, drawn, completions);
        summary.step = self.state.step;
        self.publish();
        self.meters.step(&summary)?;
        self.last = serde_json::to_value(&summary).map_err(|e| Error::State(e.to_string()))?;
        self.journal.append(&self.last).await?;
        self.write_status().await?;
        self.tell(Event::Step(Box::new(summary)));
        Ok(())
    }

    /// Notes an evaluation, and makes it visible.
    pub(super) async fn finish_evaluation(&mut self, evaluation: Evaluation) -> Result<()> {
        self.meters.evaluation(&evaluation)?;
        self.state.evaluations.push(evaluation.clone());
        self.tell(Event::Evaluated(Box::new(evaluation)));
        self.write_status().await
    }

    /// Exports counters and the load of the roles.
    pub(super) fn publish(&self) {
        self.meters.counters(&self.state.counters);
        self.meters.set(process::JOB_STEPS, self.common.job.steps as f64);
        self.meters.set(process::DROPPED_ROWS, self.dropped.total() as f64);
        for (role, busy, depth) in self.roles.loads() {
            self.meters.set_series(process::ROLE_BUSY_SECONDS, role, busy);
            self.meters.set_series(process::MAILBOX_DEPTH, role, depth as f64);
        }
        if let Some(evaluation) = self.state.evaluations.last() {
            // Numbers that an earlier version kept and this one has no metric for are not exported.
            let _ = self.meters.evaluation(evaluation);
        }
    }

    /// Writes what `rehearsal status` shows of a job that another process runs.
    pub(super) async fn write_status(&self) -> Result<()> {
        let evaluation = |e: &Evaluation| {
            let mut row = json!(e.stats);
            row["step"] = json!(e.step);
            row
        };
        let mut status = json!({
            "process": std::process::id(), "step": self.state.step, "steps": self.common.job.steps,
            "checkpoint": self.saved, "time_ms": crate::time::now_ms(), "last": self.last,
            "counters": self.state.counters,
            "evaluations": self.state.evaluations.iter().map(evaluation).collect::<Vec<_>>(),
            "algorithm": self.algorithm, "dropped": self.dropped,
        });
        let budget = self.budget;
        let status = move || {
            status["memory"] = json!({"predicted": budget, "measured_peak": memory::measured_peak()});
            status
        };
        self.journal.status(status).await
    }
}
