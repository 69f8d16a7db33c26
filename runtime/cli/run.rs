//! `rehearsal run` and `rehearsal resume`.

use std::path::Path;
use std::process::ExitCode;

use tokio_util::sync::CancellationToken;

use super::progress::Progress;
use super::{FAILED, STOPPED};
use crate::config::folder_of;
use crate::error::{At, Error, Result};
use crate::job::{CONFIG_FILE, Job};
use crate::{Config, Outcome};

pub fn run(file: &Path) -> Result<ExitCode> {
    let config = Config::load(file)?;
    let source = std::fs::read_to_string(file).at(file)?;
    // The copy lies elsewhere: its relative paths must lead to the same places.
    let source = format!("# base = {}\n{source}", folder_of(file).display());
    work(Job::builder(config).source(source).build()?, false)
}

pub fn resume(directory: &Path, file: Option<&Path>) -> Result<ExitCode> {
    work(Job::builder(saved_config(directory, file)?).build()?, true)
}

/// The configuration a job was started with, or another file in its place.
pub fn saved_config(directory: &Path, file: Option<&Path>) -> Result<Config> {
    if let Some(file) = file {
        return Ok(Config::load(file)?);
    }
    let copy = directory.join(CONFIG_FILE);
    if !copy.exists() {
        return Err(Error::NothingToResume(directory.into()));
    }
    let source = std::fs::read_to_string(&copy).at(&copy)?;
    let base = source.lines().next().and_then(|l| l.strip_prefix("# base = ")).unwrap_or(".").to_string();
    let mut config =
        Config::from_toml(&source, Path::new(&base)).map_err(|e| crate::config::ConfigError { file: copy, ..e })?;
    // The directory may have been moved since.
    config.job.directory = directory.into();
    Ok(config)
}

fn work(job: Job, resume: bool) -> Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new().map_err(|e| Error::State(e.to_string()))?;
    let cancel = CancellationToken::new();
    let on_signal = cancel.clone();
    // The second signal does not wait.
    let handled = ctrlc::set_handler(move || {
        if on_signal.is_cancelled() {
            std::process::exit(i32::from(STOPPED));
        }
        on_signal.cancel();
    });
    if let Err(e) = handled {
        tracing::warn!("signals are not handled: {e}");
    }
    let outcome = runtime.block_on(async {
        let progress = Progress::start(job.events());
        let outcome = if resume { job.resume(cancel).await } else { job.run(cancel).await };
        progress.end().await;
        outcome
    })?;
    report(&outcome);
    Ok(if outcome.stopped {
        ExitCode::from(STOPPED)
    } else if outcome.step < outcome.steps {
        ExitCode::from(FAILED)
    } else {
        ExitCode::SUCCESS
    })
}

/// What changed between the first evaluation and the last.
fn report(outcome: &Outcome) {
    let here = std::env::current_dir().unwrap_or_default();
    let directory = outcome.directory.strip_prefix(&here).unwrap_or(&outcome.directory).display();
    if outcome.stopped {
        println!("stopped after step {} of {}; go on with: rehearsal resume {directory}", outcome.step, outcome.steps);
        return;
    }
    if let [first, .., last] = outcome.evaluations.as_slice() {
        println!("\nheld-out prompts    before    after");
        println!("  reward          {:8.3} {:8.3}", first.reward, last.reward);
        println!("  KL to reference {:8.3} {:8.3}", first.kl, last.kl);
        println!("  tokens          {:8.1} {:8.1}", first.tokens, last.tokens);
        for (before, after) in first.samples.iter().zip(&last.samples) {
            println!("\n  {}", before.prompt.replace('\n', " "));
            println!("    before ({:6.3}): {}", before.score, before.completion.replace('\n', " "));
            println!("    after  ({:6.3}): {}", after.score, after.completion.replace('\n', " "));
        }
    }
    println!("\n{} steps done; the model: rehearsal export {directory} --model OUT", outcome.step);
}
