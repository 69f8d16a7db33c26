//! `rehearsal status` and `rehearsal verify`: progress and integrity of a job.

use std::path::Path;
use std::process::ExitCode;

use super::exit::DAMAGED;
use super::print::say;
use super::saved;
use crate::access::{JobReader, Verified};
use crate::error::Result;
use crate::memory::MemoryBudget;
use crate::status::{JobStatus, MemoryUse, Waiting};

/// Prints progress, newest metrics, memory and checkpoints.
pub fn status(directory: &Path) -> Result<ExitCode> {
    saved::block_on(async {
        let job = JobReader::open(directory).await?;
        let status = job.status().await?;
        show(&status);
        if job.is_running() {
            say!("running as process {}", status.process);
            for Waiting { wait, seconds } in &status.waiting {
                say!("  waiting for {seconds:.0} s: {wait}");
            }
        } else {
            say!("not running");
        }
        for repair in job.repairs() {
            say!("  repaired: {}", repair.0);
        }
        // A process that is starting answers nothing yet.
        for c in job.checkpoints().await.unwrap_or_default() {
            say!("  checkpoint of step {:6}: {} tensors, {:.1} MB", c.step, c.tensors, c.bytes as f64 / 1e6);
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn show(status: &JobStatus) {
    if status.steps == 0 {
        say!("no step is finished yet");
        return;
    }
    let checkpoint = status.checkpoint.map_or("none".into(), |step| step.to_string());
    say!("{}: step {} of {}, newest checkpoint {checkpoint}", status.algorithm, status.step, status.steps);
    let last = &status.last;
    let keys = [
        "loss",
        "reward",
        "kl",
        "preference_accuracy",
        "margin",
        "completion_tokens",
        "explained_variance",
        "mismatch_kl",
    ];
    for key in keys.iter().filter(|key| !last[**key].is_null()) {
        say!("  {key:19} {}", last[*key]);
    }
    for (reason, dropped) in &status.dropped.0 {
        say!("  {} rows left out: each {reason} (first: {})", dropped.rows, dropped.first);
    }
    say!("  {:19} {}", "seconds per step", last["seconds"]["total"]);
    memory(&status.memory);
}

/// Prints the measured peak of memory and the predicted one by part.
fn memory(memory: &MemoryUse) {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    if let Some(measured) = memory.measured_peak {
        say!("  {:19} {:.0} MB at most", "memory", megabytes(measured));
    }
    memory.predicted.iter().for_each(predicted);
}

/// Prints the predicted memory by part.
pub fn predicted(budget: &MemoryBudget) {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let parts = budget.by_purpose();
    let of = parts.iter().filter(|(name, _)| *name != "peak");
    let of: Vec<String> = of.map(|(name, bytes)| format!("{name} {:.0}", megabytes(*bytes))).collect();
    say!("  {:19} {:.0} MB: {}", "memory, predicted", megabytes(budget.peak), of.join(", "));
}

/// Checks every checksum of the store and prints what is damaged.
pub fn verify(directory: &Path) -> Result<ExitCode> {
    saved::block_on(async {
        let job = JobReader::open(directory).await?;
        for repair in job.repairs() {
            say!("repaired: {}", repair.0);
        }
        let Verified { intact, damaged } = job.verify().await?;
        for problem in &damaged {
            say!("damaged: {problem}");
        }
        say!("{intact} records and checkpoints are intact, {} damaged", damaged.len());
        Ok(if damaged.is_empty() && job.repairs().is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
    })
}
