//! What every algorithm has in common: evaluations and checkpoints when they are due, the end, pauses, recovery.

use std::fs;
use std::time::Instant;

use rehearsal_actors::save_normalisation;

use super::algorithm::Algorithm;
use super::run::Run;
use crate::blocking::blocking;
use crate::error::{At, Error, Result};
use crate::events::{Event, Outcome};

/// The trained model, in the job's directory, once the job is done.
pub const MODEL_FOLDER: &str = "model";

/// Restores the newest checkpoint, then takes steps to the end, returning to the last checkpoint whenever a role dies.
pub async fn drive(run: &mut Run, algorithm: &mut dyn Algorithm) -> Result<Outcome> {
    run.restore().await?;
    run.readiness.set(true);
    run.tell(Event::Started {
        step: run.state.step,
        steps: run.common.job.steps,
        parameters: run.model.parameters.values().map(|t| t.elem_count() as u64).sum(),
        rows: run.rows,
        dropped: run.dropped.clone(),
    });
    let stopped = loop {
        let restarts = run.roles.director.restarts();
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
                recover(run, restarts + 1).await?;
                run.readiness.set(true);
            }
            Err(e) => return Err(e),
        }
    };
    run.readiness.set(false);
    if !stopped {
        export(run, algorithm).await?;
    }
    Ok(Outcome {
        directory: run.common.job.directory.clone(),
        step: run.state.step,
        steps: run.common.job.steps,
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
        if run.state.step >= run.common.job.steps {
            return run.settle().await;
        }
        boundary(run).await?;
        let start = Instant::now();
        let mut step = algorithm.step(run).await?;
        step.summary.seconds.total = start.elapsed().as_secs_f64();
        run.finish_step(step).await?;
    }
}

/// Whether an evaluation is due between two steps and not done.
fn evaluation_due(run: &Run) -> bool {
    let (step, every) = (run.state.step, run.common.evaluation.every_steps);
    let due = every > 0 && (step.is_multiple_of(every) || step >= run.common.job.steps);
    due && run.state.evaluations.last().is_none_or(|e| e.step != step)
}

/// Whether a checkpoint is due between two steps; it is written while the next completions are generated.
fn checkpoint_due(run: &Run) -> bool {
    let (step, every) = (run.state.step, run.common.checkpoint.every_steps);
    step > 0 && (step.is_multiple_of(every) || step >= run.common.job.steps)
}

/// Between two steps: waits while the job is paused; an error once it is asked to stop.
async fn boundary(run: &Run) -> Result<()> {
    tokio::select! {
        () = run.roles.director.wait_while_paused() => {}
        () = run.cancel.cancelled() => {}
    }
    if run.cancel.is_cancelled() { Err(rehearsal_actors::Error::Cancelled.into()) } else { Ok(()) }
}

/// Waits until every death is dealt with and returns to the last checkpoint, however often a role dies meanwhile.
async fn recover(run: &mut Run, mut restarts: u32) -> Result<()> {
    loop {
        run.roles.director.wait_for_restarts(restarts).await;
        if let Some(failure) = run.roles.director.failure() {
            return Err(failure.into());
        }
        match run.restore().await {
            Err(e) if e.is_death() => restarts += 1,
            other => return other,
        }
    }
}

/// Writes the trained model beside the store as a Hugging Face directory: all of it, or what was there before.
async fn export(run: &mut Run, algorithm: &mut dyn Algorithm) -> Result<()> {
    let directory = &run.common.job.directory;
    let (temporary, last) = (directory.join("model.tmp"), directory.join(MODEL_FOLDER));
    let trained = || Error::Internal("the algorithm has started no model to train".into());
    run.roles.trained.first().ok_or_else(trained)?.export(temporary.clone()).await?;
    let normalisation = algorithm.normalisation(run).await?;
    blocking(move || {
        if let Some(normalisation) = normalisation {
            save_normalisation(&temporary, &normalisation).at(&temporary)?;
        }
        if last.exists() {
            fs::remove_dir_all(&last).at(&last)?;
        }
        fs::rename(&temporary, &last).at(&last)
    })
    .await
}
