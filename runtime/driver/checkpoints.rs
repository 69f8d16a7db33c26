//! Saving a job's state and returning to it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rehearsal_actors::JobCheckpoint;
use rehearsal_store::SavedCheckpoint;
use tokio::task::JoinHandle;

use super::journal::Log;
use super::run::Run;
use super::state::JobState;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::metrics::table::process;

/// A checkpoint that is being written.
pub struct Writing {
    step: u64,
    written: JoinHandle<Result<(SavedCheckpoint, Duration)>>,
}

impl Run {
    /// Saves a checkpoint of the current state, unless it is saved already, and waits until it is durable.
    pub(super) async fn checkpoint(&mut self) -> Result<()> {
        self.begin_checkpoint().await?;
        self.settle().await
    }

    /// Begins to save a checkpoint of the current state, unless it is saved already. The checkpoint shares storage with
    /// the models, so [`Run::settle`] must come before anything changes them.
    pub(super) async fn begin_checkpoint(&mut self) -> Result<()> {
        self.settle().await?;
        if self.saved == Some(self.state.step) {
            return Ok(());
        }
        let start = Instant::now();
        let mut models = BTreeMap::new();
        for model in &self.roles.trained {
            models.insert(model.name().to_string(), model.snapshot().await?);
        }
        models.extend(self.roles.schedule.iter().flat_map(|schedule| schedule.older_weights(self.state.step)));
        let checkpoint = JobCheckpoint {
            step: self.state.step,
            models,
            state: self.state.encode()?,
            keep: self.common.checkpoint.kept(),
        };
        let (archivist, journal, step) = (self.roles.archivist.clone(), self.journal.clone(), checkpoint.step);
        let written = tokio::spawn(async move {
            journal.sync().await?;
            let saved = archivist.checkpoint(&checkpoint).await?;
            Ok((saved, start.elapsed()))
        });
        self.begun = start.elapsed();
        self.writing = Some(Writing { step, written });
        Ok(())
    }

    /// Waits for the checkpoint that is being written.
    pub(super) async fn settle(&mut self) -> Result<()> {
        let Some(Writing { step, written }) = self.writing.take() else { return Ok(()) };
        let lost = |_| rehearsal_actors::Error::Died { role: "archivist", reason: None };
        let (saved, took) = written.await.map_err(lost)??;
        self.meters.set(process::CHECKPOINT_INTERVAL, self.interval.steps() as f64);
        self.saved = Some(step);
        self.meters.set(process::DISK_FULL, 0.0);
        self.meters.set(process::CHECKPOINT_SECONDS, took.as_secs_f64());
        self.meters.set(process::CHECKPOINT_BYTES, saved.written as f64);
        self.meters.set(process::CHECKPOINT_STEP, step as f64);
        self.tell(Event::Checkpoint { step, bytes: saved.written, took });
        self.write_status().await
    }

    /// Returns to the newest checkpoint, or to the start where there is none.
    pub(crate) async fn restore(&mut self) -> Result<()> {
        self.restarts_restored = self.roles.director.restarts();
        // A checkpoint that is being written is durable or not by the time the archivist answers.
        self.writing = None;
        self.mid_step = false;
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
                for model in &self.roles.trained {
                    let missing = || Error::SavedState { reason: format!("the checkpoint has no {}", model.name()) };
                    model.restore(restored.models.remove(model.name()).ok_or_else(missing)?).await?;
                }
                if let Some(schedule) = &self.roles.schedule {
                    schedule.restore(self.state.step, &mut restored.models);
                }
                self.saved = Some(self.state.step);
            }
            None => {
                for model in &self.roles.trained {
                    model.reset().await?;
                }
                if let Some(schedule) = &self.roles.schedule {
                    schedule.restore(0, &mut BTreeMap::new());
                }
                self.state = JobState::default();
                self.saved = None;
            }
        }
        let (last, damaged) = self.journal.cut(Log::History, self.state.step).await?;
        self.last = last;
        let (_, more) = self.journal.cut(Log::Evaluations, self.state.step).await?;
        for (damaged, name) in [(damaged, "history"), (more, "evaluations")] {
            if damaged > 0 {
                let message = format!(
                    "{damaged} lines of {name}.jsonl are damaged and were left out; {name}.damaged.jsonl is the file as it \
                     was"
                );
                self.tell(Event::Repaired { message });
            }
        }
        self.publish();
        self.write_status().await
    }
}
