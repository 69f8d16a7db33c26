//! What every algorithm has in common: evaluations and checkpoints when they are due, the end, pauses, recovery.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::DType;
use rehearsal_actors::save_normalisation;
use rehearsal_learn::reward::Normalisation;

use super::algorithm::Algorithm;
use super::command::Command;
use super::run::Run;
use crate::blocking::blocking;
use crate::error::{At, Error, Result};
use crate::events::{Event, Outcome};
use crate::metrics::table::process;
use crate::model_directory::Writing;

/// The trained model, in the job's directory, once the job is done.
pub const MODEL_FOLDER: &str = "model";

/// Takes steps of a restored job to the end, returning to the last checkpoint whenever a role dies.
pub async fn drive(run: &mut Run, algorithm: &mut dyn Algorithm) -> Result<Outcome> {
    run.readiness.set(true);
    run.tell(Event::Started {
        step: run.state.step,
        steps: run.common.job.steps,
        parameters: run.model.parameters.values().map(|t| t.elem_count() as u64).sum(),
        rows: run.rows,
        dropped: run.dropped.clone(),
    });
    let stopped = loop {
        match steps(run, algorithm).await {
            Ok(()) => break false,
            Err(e) if e.is_cancelled() || e.is_spent() => {
                if e.is_spent() {
                    run.tell(Event::BudgetSpent { message: e.to_string() });
                }
                // A step that is cut off between two updates is taken again from the last checkpoint.
                if run.mid_step {
                    run.restore().await?
                } else {
                    run.checkpoint().await?
                }
                break true;
            }
            Err(e) if e.is_death() => {
                run.readiness.set(false);
                recover(run).await?;
                run.readiness.set(true);
            }
            Err(e) => return Err(e),
        }
    };
    run.readiness.set(false);
    if !stopped {
        export(run, algorithm).await?;
        run.done = true;
        run.write_status().await?;
        while let Ok(command) = run.commands.try_recv() {
            run.carry_out(command).await?;
        }
    }
    Ok(Outcome {
        directory: run.common.job.directory.clone(),
        step: run.state.step,
        // A job whose patience is over has had its last step.
        steps: if stopped { run.common.job.steps } else { run.state.step },
        stopped,
        evaluations: run.state.evaluations.clone(),
    })
}

/// Steps until the last one. What is due between two steps is decided from the state alone, so a resumed job does what
/// the one before it did not get to.
async fn steps(run: &mut Run, algorithm: &mut dyn Algorithm) -> Result<()> {
    loop {
        if evaluation_due(run)
            && let Some(evaluation) = algorithm.evaluate(run).await?
        {
            run.finish_evaluation(evaluation).await?;
        }
        if checkpoint_due(run) {
            run.begin_checkpoint().await?;
        }
        if run.state.step >= run.common.job.steps || is_patience_over(run) {
            return run.checkpoint().await;
        }
        boundary(run).await?;
        let with_checkpoint = run.writing.is_some();
        let start = Instant::now();
        let mut step = algorithm.step(run).await?;
        let took = start.elapsed();
        // Beginning the checkpoint kept the job waiting too, before the step.
        if let Some(steps) = run.interval.step_took(took + std::mem::take(&mut run.begun), with_checkpoint) {
            run.meters.set(process::CHECKPOINT_INTERVAL, steps as f64);
            run.tell(Event::CheckpointInterval { steps });
        }
        step.summary.seconds.total = took.as_secs_f64();
        run.finish_step(step).await?;
    }
}

/// Whether so many evaluations were not better than the best one that the job ends early.
fn is_patience_over(run: &Run) -> bool {
    let patience = run.common.evaluation.patience;
    patience > 0 && run.state.best.is_some_and(|best| best.since >= patience)
}

/// Whether an evaluation is due between two steps and not done.
fn evaluation_due(run: &Run) -> bool {
    let (step, every) = (run.state.step, run.common.evaluation.every_steps);
    let due = every > 0 && (step.is_multiple_of(every) || step >= run.common.job.steps);
    due && run.state.evaluations.last().is_none_or(|e| e.step != step)
}

/// Whether a checkpoint is due between two steps; it is written while the next completions are generated.
fn checkpoint_due(run: &mut Run) -> bool {
    let step = run.state.step;
    step > 0 && (run.interval.is_due(step, run.saved) || step >= run.common.job.steps)
}

/// Between two steps: carries out commands, and waits while the job is paused; an error once it is asked to stop.
async fn boundary(run: &mut Run) -> Result<()> {
    if run.roles.director.is_paused() {
        run.tell(Event::Paused { step: run.state.step });
        run.status.send_modify(|status| status.paused = true);
    }
    loop {
        tokio::select! {
            biased;
            () = run.cancel.cancelled() => return Err(rehearsal_actors::Error::Cancelled.into()),
            Some(command) = run.commands.recv() => run.carry_out(command).await?,
            () = run.roles.director.wait_while_paused() => {
                run.status.send_if_modified(|status| std::mem::take(&mut status.paused));
                return Ok(());
            }
        }
    }
}

/// Waits until every death is dealt with and returns to the last checkpoint, however often a role dies meanwhile.
async fn recover(run: &mut Run) -> Result<()> {
    loop {
        run.roles.director.wait_for_restarts(run.restarts_restored + 1).await?;
        if let Some(failure) = run.roles.director.failure() {
            return Err(failure.into());
        }
        match run.restore().await {
            Err(e) if e.is_death() => {}
            other => return other,
        }
    }
}

/// Writes the trained model into the job's directory: all of it, or what was there before.
async fn export(run: &mut Run, algorithm: &mut dyn Algorithm) -> Result<()> {
    let normalisation = algorithm.normalisation(run).await?;
    run.write_model(run.common.job.directory.join(MODEL_FOLDER), DType::F32, normalisation).await
}

impl Run {
    /// Carries out a command. Its errors go to who gave it, except for those that end or restart the job.
    async fn carry_out(&mut self, command: Command) -> Result<()> {
        let (reply, result) = match command {
            Command::Checkpoint { reply } => (reply, self.checkpoint().await),
            Command::Export { directory, dtype, reply } => (reply, self.write_model(directory, dtype, None).await),
        };
        let died = result.as_ref().is_err_and(|e| e.is_death());
        let step = self.state.step;
        if died {
            drop(reply);
            return result;
        }
        let _ = reply.send(result.map(|()| step)); // who asked may be gone
        Ok(())
    }

    /// Writes the trained model as a Hugging Face directory; an earlier one is replaced as a whole.
    pub(super) async fn write_model(
        &self,
        directory: PathBuf,
        dtype: DType,
        normalisation: Option<Normalisation>,
    ) -> Result<()> {
        let writing = blocking(move || Writing::begin(&directory)).await?;
        let trained = || Error::Internal("the algorithm has started no model to train".into());
        self.roles.trained.first().ok_or_else(trained)?.export(writing.path().to_path_buf(), dtype).await?;
        blocking(move || {
            if let Some(normalisation) = normalisation {
                save_normalisation(writing.path(), &normalisation).at(writing.path())?;
            }
            writing.end()
        })
        .await
    }
}
