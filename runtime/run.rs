//! A job under way: its roles, its state, and the small things every loop does with them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rehearsal_actors::{
    ArchivistHandle, BufferHandle, Director, JobCheckpoint, PolicyHandle, ReferenceHandle, RewardHandle, RoleStats,
};
use rehearsal_lm::Checkpoint;
use rehearsal_lm::generate::Options;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{At, Error, Result};
use crate::events::{Event, StepSummary};
use crate::memory::{self, MemoryBudget};
use crate::metrics::Meters;
use crate::prompts::Prompts;
use crate::state::{Evaluation, JobState};

/// The roles of a job.
pub(crate) struct Roles {
    pub director: Director,
    pub policy: PolicyHandle,
    pub reference: ReferenceHandle,
    pub reward: RewardHandle,
    pub buffer: BufferHandle,
    pub archivist: ArchivistHandle,
}

/// What a loop works with.
pub(crate) struct Run {
    pub config: Config,
    pub roles: Roles,
    pub state: JobState,
    pub prompts: Prompts,
    pub model: Arc<Checkpoint>,
    pub meters: Arc<Meters>,
    pub events: broadcast::Sender<Event>,
    pub cancel: CancellationToken,
    /// Step of the newest durable checkpoint.
    pub saved: Option<u64>,
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

    /// Saves a checkpoint of the state as it is, unless it is saved already.
    pub async fn checkpoint(&mut self) -> Result<()> {
        if self.saved == Some(self.state.step) {
            return Ok(());
        }
        let start = Instant::now();
        let checkpoint = JobCheckpoint {
            step: self.state.step,
            policy: self.roles.policy.snapshot().await?,
            state: self.state.encode()?,
            keep: self.config.checkpoint.keep,
        };
        let saved = self.roles.archivist.checkpoint(&checkpoint).await?;
        self.saved = Some(self.state.step);
        let took = start.elapsed();
        self.meters.set("disk_full", "", 0.0);
        self.meters.set("checkpoint_seconds", "", took.as_secs_f64());
        self.meters.set("checkpoint_bytes", "", saved.written as f64);
        self.meters.set("checkpoint_step", "", self.state.step as f64);
        self.tell(Event::Checkpoint { step: self.state.step, bytes: saved.written, took });
        self.write_status()
    }

    /// Goes back to the newest checkpoint, or to the start where there is none.
    pub async fn restore(&mut self) -> Result<()> {
        let (restored, repairs) = self.roles.archivist.restore().await?;
        for repair in repairs {
            self.tell(Event::Repaired { message: repair.0 });
        }
        self.roles.buffer.clear().await?;
        match restored {
            Some(restored) => {
                self.state = JobState::decode(&restored.state)?;
                self.roles.policy.restore(restored.policy).await?;
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

    /// Ends a step: state, metrics, history, event, status.
    pub fn step_done(&mut self, summary: StepSummary) -> Result<()> {
        self.publish();
        self.meters.step(&summary);
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
        self.meters.evaluation(&evaluation);
        self.state.evaluations.push(evaluation.clone());
        self.tell(Event::Evaluated(Box::new(evaluation)));
        self.write_status()
    }

    /// Exports counters and the state of the roles.
    fn publish(&self) {
        self.meters.counters(&self.state.counters);
        self.meters.set("job_steps", "", self.config.job.steps as f64);
        let r = &self.roles;
        let of = |stats: &RoleStats| stats.busy().as_secs_f64();
        for (role, busy, depth) in [
            ("policy", of(r.policy.stats()), r.policy.depth()),
            ("reference", of(r.reference.stats()), r.reference.depth()),
            ("reward", of(r.reward.stats()), r.reward.depth()),
            ("buffer", of(r.buffer.stats()), r.buffer.depth()),
            ("archivist", of(r.archivist.stats()), r.archivist.depth()),
        ] {
            self.meters.set("role_busy_seconds", role, busy);
            self.meters.set("mailbox_depth", role, depth as f64);
        }
        if let Some(evaluation) = self.state.evaluations.last() {
            self.meters.evaluation(evaluation);
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
        let evaluation = |e: &Evaluation| json!({"step": e.step, "reward": e.reward, "kl": e.kl, "tokens": e.tokens});
        let status = json!({
            "process": std::process::id(), "step": self.state.step, "steps": self.config.job.steps,
            "checkpoint": self.saved, "time_ms": now_ms(), "last": self.last, "counters": self.state.counters,
            "evaluations": self.state.evaluations.iter().map(evaluation).collect::<Vec<_>>(),
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
