//! A job under way: its roles, its state, and the small things every loop does with them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rehearsal_actors::{
    ArchivistHandle, BufferHandle, CriticHandle, Director, JobCheckpoint, Marked, Objective, PolicyHandle,
    ReferenceHandle, RewardHandle, RoleStats, StepReport, UpdateBatch,
};
use rehearsal_lm::Checkpoint;
use rehearsal_lm::generate::Options;
use rehearsal_store::SavedCheckpoint;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::config::methods::Algorithm;
use crate::data::{Data, Dropped, Prompts};
use crate::error::{At, Error, Result};
use crate::events::{Event, StepSummary};
use crate::exporter::Readiness;
use crate::label::Served;
use crate::memory::{self, MemoryBudget};
use crate::metrics::Meters;
use crate::metrics::table::process;
use crate::state::{Evaluation, JobState};

/// The roles of a job; an algorithm has those it needs.
pub(crate) struct Roles {
    pub director: Director,
    pub archivist: ArchivistHandle,
    pub policy: Option<PolicyHandle>,
    pub reference: Option<ReferenceHandle>,
    pub reward: Option<RewardHandle>,
    pub critic: Option<CriticHandle>,
    pub buffer: Option<BufferHandle>,
    /// The page for labellers, and where it is.
    pub page: Option<(Served, String)>,
}

/// A role that the algorithm needs and was started with.
fn needed<'a, T>(role: &'a Option<T>, name: &str) -> Result<&'a T> {
    role.as_ref().ok_or_else(|| Error::State(format!("the algorithm has no {name}")))
}

impl Roles {
    pub fn policy(&self) -> Result<&PolicyHandle> {
        needed(&self.policy, "policy")
    }

    pub fn reference(&self) -> Result<&ReferenceHandle> {
        needed(&self.reference, "reference")
    }

    pub fn reward(&self) -> Result<&RewardHandle> {
        needed(&self.reward, "reward")
    }

    pub fn critic(&self) -> Result<&CriticHandle> {
        needed(&self.critic, "critic")
    }

    pub fn buffer(&self) -> Result<&BufferHandle> {
        needed(&self.buffer, "buffer")
    }
}

/// A checkpoint on its way to the disk.
pub(crate) struct Writing {
    step: u64,
    written: JoinHandle<rehearsal_actors::Result<(SavedCheckpoint, Duration)>>,
}

/// What a loop works with.
pub(crate) struct Run {
    pub config: Config,
    pub roles: Roles,
    pub state: JobState,
    pub prompts: Prompts,
    pub data: Option<Data>,
    /// PPO's pretraining text.
    pub pretraining: Vec<Marked>,
    pub dropped: Dropped,
    pub model: Arc<Checkpoint>,
    pub meters: Arc<Meters>,
    /// Set while the state is restored and steps run.
    pub readiness: Readiness,
    pub events: broadcast::Sender<Event>,
    pub cancel: CancellationToken,
    /// Step of the newest durable checkpoint.
    pub saved: Option<u64>,
    /// The checkpoint that is being written, and since when.
    pub writing: Option<Writing>,
    /// The last step's line of the history.
    pub last: Value,
    /// Where the memory should go.
    pub budget: Option<MemoryBudget>,
}

impl Run {
    /// Tells those who watch; nobody has to.
    pub fn tell(&self, event: Event) {
        tracing::debug!(?event);
        let _ = self.events.send(event);
    }

    /// Settings of generation for a step or an evaluation.
    pub fn generation(&self) -> Options {
        let rollout = &self.config.rollout;
        Options {
            sampling: rollout.sampling,
            max_new_tokens: rollout.max_new_tokens,
            min_new_tokens: rollout.min_new_tokens,
            eos: self.model.architecture.eos.clone(),
            stop: rollout.stop.clone(),
            seed: self.config.job.seed,
            batch: rollout.batch,
        }
    }

    /// Between two steps: waits while the job is paused; an error once it is asked to stop.
    pub async fn boundary(&self) -> Result<()> {
        tokio::select! {
            () = self.roles.director.unpaused() => {}
            () = self.cancel.cancelled() => {}
        }
        if self.cancel.is_cancelled() { Err(rehearsal_actors::Error::Cancelled.into()) } else { Ok(()) }
    }

    /// Saves a checkpoint of the state as it is, unless it is saved already, and waits until it is durable.
    pub async fn checkpoint(&mut self) -> Result<()> {
        self.begin_checkpoint().await?;
        self.settle().await
    }

    /// Begins to save a checkpoint of the state as it is, unless it is saved already. It shares storage with the models:
    /// [`Run::settle`] comes before anything changes them.
    pub async fn begin_checkpoint(&mut self) -> Result<()> {
        self.settle().await?;
        if self.saved == Some(self.state.step) {
            return Ok(());
        }
        let start = Instant::now();
        let mut models = BTreeMap::new();
        if let Some(policy) = &self.roles.policy {
            models.insert("policy".to_string(), policy.snapshot().await?);
        }
        if let Some(critic) = &self.roles.critic {
            models.insert("critic".to_string(), critic.snapshot().await?);
        }
        let checkpoint = JobCheckpoint {
            step: self.state.step,
            models,
            state: self.state.encode()?,
            keep: self.config.checkpoint.keep,
        };
        let (archivist, step) = (self.roles.archivist.clone(), checkpoint.step);
        let written = tokio::spawn(async move {
            let saved = archivist.checkpoint(&checkpoint).await?;
            Ok((saved, start.elapsed()))
        });
        self.writing = Some(Writing { step, written });
        Ok(())
    }

    /// Waits for the checkpoint that is being written.
    pub async fn settle(&mut self) -> Result<()> {
        let Some(Writing { step, written }) = self.writing.take() else { return Ok(()) };
        let lost = |_| rehearsal_actors::Error::Died { role: "archivist", reason: None };
        let (saved, took) = written.await.map_err(lost)??;
        self.saved = Some(step);
        self.meters.set(process::DISK_FULL, 0.0);
        self.meters.set(process::CHECKPOINT_SECONDS, took.as_secs_f64());
        self.meters.set(process::CHECKPOINT_BYTES, saved.written as f64);
        self.meters.set(process::CHECKPOINT_STEP, step as f64);
        self.tell(Event::Checkpoint { step, bytes: saved.written, took });
        self.write_status()
    }

    /// Goes back to the newest checkpoint, or to the start where there is none.
    pub async fn restore(&mut self) -> Result<()> {
        // What is being written is durable or not by the time the archivist answers.
        self.writing = None;
        let (restored, repairs) = self.roles.archivist.restore().await?;
        for repair in repairs {
            self.tell(Event::Repaired { message: repair.0 });
        }
        if let Some(buffer) = &self.roles.buffer {
            buffer.clear().await?;
        }
        match restored {
            Some(mut restored) => {
                self.state = JobState::decode(&restored.state)?;
                let mut take = |role: &str| {
                    let missing = || Error::State(format!("the checkpoint has no {role}"));
                    restored.models.remove(role).ok_or_else(missing)
                };
                if let Some(policy) = &self.roles.policy {
                    policy.restore(take("policy")?).await?;
                }
                if let Some(critic) = &self.roles.critic {
                    critic.restore(take("critic")?).await?;
                }
                self.saved = Some(self.state.step);
            }
            None => {
                self.state = JobState::default();
                self.saved = None;
            }
        }
        self.cut_history()?;
        self.publish();
        self.write_status()
    }

    /// One update of the policy (or of the model that is trained in its place). A loss that is no number ends the job:
    /// what it came of is written out, and the last good checkpoint stays.
    pub async fn learn(&mut self, objective: Objective, learning_rate: f64) -> Result<StepReport> {
        self.settle().await?;
        let temperature = match self.config.job.algorithm {
            Algorithm::Sft | Algorithm::RewardModel | Algorithm::Dpo => 1.0,
            _ => self.config.rollout.sampling.logprob_temperature(),
        };
        let batch = UpdateBatch { objective, learning_rate, temperature };
        let cancel = self.cancel.clone();
        let objective = batch.objective.clone();
        let result = match &self.roles.policy {
            Some(policy) => policy.step(batch, cancel).await,
            None => self.roles.critic()?.step(batch, cancel).await,
        };
        match result {
            Err(error @ rehearsal_actors::Error::NotFinite { .. }) => {
                let path = self.config.job.directory.join(format!("offending-batch-{}.txt", self.state.step));
                fs::write(&path, format!("{error}\nlearning rate {learning_rate}\n{objective:#?}\n")).at(&path)?;
                Err(Error::Offending { path, error: Box::new(error.into()) })
            }
            other => Ok(other?),
        }
    }

    /// Ends a step: state, metrics, history, event, status.
    pub fn step_done(&mut self, summary: StepSummary) -> Result<()> {
        self.publish();
        self.meters.step(&summary)?;
        self.last = serde_json::to_value(&summary).map_err(|e| Error::State(e.to_string()))?;
        let line = &self.last;
        let path = self.history_path();
        let mut file = fs::File::options().create(true).append(true).open(&path).at(&path)?;
        writeln!(file, "{line}").at(&path)?;
        self.write_status()?;
        self.tell(Event::Step(Box::new(summary)));
        Ok(())
    }

    /// Ends an evaluation.
    pub fn evaluated(&mut self, evaluation: Evaluation) -> Result<()> {
        self.meters.evaluation(&evaluation)?;
        self.state.evaluations.push(evaluation.clone());
        self.tell(Event::Evaluated(Box::new(evaluation)));
        self.write_status()
    }

    /// Exports counters and the state of the roles.
    fn publish(&self) {
        self.meters.counters(&self.state.counters);
        self.meters.set(process::JOB_STEPS, self.config.job.steps as f64);
        let r = &self.roles;
        let of = |stats: &RoleStats| stats.busy().as_secs_f64();
        let roles = [
            ("policy", r.policy.as_ref().map(|h| (of(h.stats()), h.depth()))),
            ("reference", r.reference.as_ref().map(|h| (of(h.stats()), h.depth()))),
            ("reward", r.reward.as_ref().map(|h| (of(h.stats()), h.depth()))),
            ("critic", r.critic.as_ref().map(|h| (of(h.stats()), h.depth()))),
            ("buffer", r.buffer.as_ref().map(|h| (of(h.stats()), h.depth()))),
            ("archivist", Some((of(r.archivist.stats()), r.archivist.depth()))),
        ];
        self.meters.set(process::DROPPED_ROWS, self.dropped.total() as f64);
        for (role, busy, depth) in
            roles.into_iter().filter_map(|(role, of)| of.map(|(busy, depth)| (role, busy, depth)))
        {
            self.meters.set_series(process::ROLE_BUSY_SECONDS, role, busy);
            self.meters.set_series(process::MAILBOX_DEPTH, role, depth as f64);
        }
        if let Some(evaluation) = self.state.evaluations.last() {
            // Numbers that an earlier version kept and this one has no metric for are not exported.
            let _ = self.meters.evaluation(evaluation);
        }
    }

    fn history_path(&self) -> PathBuf {
        self.config.job.directory.join("history.jsonl")
    }

    /// Drops the lines of steps that the restored state has not done.
    fn cut_history(&mut self) -> Result<()> {
        self.last = Value::Null;
        let path = self.history_path();
        let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
        let mut kept = String::new();
        for line in text.lines() {
            // A line that a kill cut short is none.
            let Ok(row) = serde_json::from_str::<Value>(line) else { continue };
            if row["step"].as_u64().is_some_and(|step| step <= self.state.step) {
                kept.extend([line, "\n"]);
                self.last = row;
            }
        }
        replace(&path, &kept)
    }

    /// What `rehearsal status` shows of a job that another process works on.
    fn write_status(&self) -> Result<()> {
        let evaluation = |e: &Evaluation| {
            let mut row = json!(e.stats);
            row["step"] = json!(e.step);
            row
        };
        let status = json!({
            "process": std::process::id(), "step": self.state.step, "steps": self.config.job.steps,
            "checkpoint": self.saved, "time_ms": now_ms(), "last": self.last, "counters": self.state.counters,
            "evaluations": self.state.evaluations.iter().map(evaluation).collect::<Vec<_>>(),
            "algorithm": self.config.job.algorithm.name(), "dropped": self.dropped,
            "memory": {"predicted": self.budget, "measured_peak": memory::measured_peak()},
        });
        replace(&self.config.job.directory.join("status.json"), &status.to_string())
    }
}

/// Replaces a file in one move, so that a reader sees the old or the new one.
fn replace(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text).at(&temporary)?;
    fs::rename(&temporary, path).at(path)
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
