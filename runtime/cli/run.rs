//! `rehearsal run` and `rehearsal resume`: jobs of one stage or more.

use std::path::Path;
use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

use super::exit::STOPPED;
use super::print::{note, say};
use super::progress::ProgressDisplay;
use super::ranks::{self, Part};
use crate::error::{Error, Result};
use crate::events::Outcome;
use crate::job::{Chain, Config};

/// Starts the job of a configuration file.
pub fn run(file: &Path, values: &[String]) -> Result<ExitCode> {
    work(Chain::load_with(file, values)?, false)
}

/// Continues the job of a directory, with the configuration in `file` if there is one.
pub fn resume(directory: &Path, file: Option<&Path>, values: &[String]) -> Result<ExitCode> {
    let chain = match file {
        Some(file) => Chain::load_with(file, values)?,
        None => Chain::saved_with(directory, values)?,
    };
    work(chain, true)
}

fn work(chain: Chain, resume: bool) -> Result<ExitCode> {
    let launched = match ranks::part(&chain)? {
        Part::Lead(launched) => launched,
        Part::Served(code) => return Ok(code),
    };
    let chain = match &launched {
        Some(launched) => chain.devices(launched.devices.clone()),
        None => chain,
    };
    let runtime = tokio::runtime::Runtime::new().map_err(Error::Threads)?;
    let cancel = cancel_on_signal();
    let several = chain.stages().len() > 1;
    for warning in chain.stages().iter().flat_map(Config::warnings) {
        note!("warning: {warning}");
    }
    let outcome = runtime.block_on(async {
        let mut shown: Vec<ProgressDisplay> = Vec::new();
        let outcome = chain
            .run(resume, cancel, &mut |job| {
                if several {
                    say!("\nstage {}", job.directory().display());
                }
                shown.push(ProgressDisplay::start(job.events()));
            })
            .await;
        for progress in shown {
            progress.end().await;
        }
        outcome
    })?;
    report(&outcome);
    Ok(if outcome.stopped { ExitCode::from(STOPPED) } else { ExitCode::SUCCESS })
}

/// A token that the first signal (Ctrl-C, SIGTERM) cancels; the second exits at once.
pub fn cancel_on_signal() -> CancellationToken {
    let cancel = CancellationToken::new();
    let signalled = cancel.clone();
    let handled = ctrlc::set_handler(move || {
        if signalled.is_cancelled() {
            std::process::exit(i32::from(STOPPED));
        }
        signalled.cancel();
    });
    if let Err(e) = handled {
        tracing::warn!("no signal handler could be installed, so that a signal ends the job without a checkpoint: {e}");
    }
    cancel
}

/// Prints metrics and samples of the first and the last evaluation side by side.
fn report(outcome: &Outcome) {
    let here = std::env::current_dir().unwrap_or_default();
    let directory = outcome.directory.strip_prefix(&here).unwrap_or(&outcome.directory).display();
    if outcome.stopped {
        say!("stopped after step {} of {}; continue with: rehearsal resume {directory}", outcome.step, outcome.steps);
        return;
    }
    if let [first, .., last] = outcome.evaluations.as_slice() {
        say!("\n{:18} {:>9} {:>9}", "held out", "before", "after");
        for (name, before) in &first.stats {
            say!("  {name:16} {before:9.3} {:9.3}", last.stat(name).unwrap_or(f64::NAN));
        }
        for (before, after) in first.samples.iter().zip(&last.samples) {
            say!("\n  {}", before.prompt.replace('\n', " "));
            say!("    before ({:6.3}): {}", before.score, before.completion.replace('\n', " "));
            say!("    after  ({:6.3}): {}", after.score, after.completion.replace('\n', " "));
        }
    }
    say!("\n{} steps done; the model is in {directory}/model", outcome.step);
}
