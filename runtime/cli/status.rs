//! `rehearsal status` and `rehearsal verify`: progress and integrity of a job.

use std::path::Path;
use std::process::ExitCode;

use rehearsal_store::{Error as StoreError, Store};
use serde_json::Value;

use super::exit::DAMAGED;
use super::saved;
use crate::error::Result;

/// Prints progress, newest metrics, memory and checkpoints.
pub fn status(directory: &Path) -> Result<ExitCode> {
    saved::require_job(directory)?;
    let status = std::fs::read(directory.join("status.json")).ok();
    let status: Option<Value> = status.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if let Some(status) = &status {
        println!(
            "{}: step {} of {}, newest checkpoint {}",
            status["algorithm"].as_str().unwrap_or("job"),
            status["step"],
            status["steps"],
            status["checkpoint"]
        );
        let last = &status["last"];
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
            println!("  {key:19} {}", last[*key]);
        }
        for (reason, dropped) in status["dropped"].as_object().into_iter().flatten() {
            println!("  {} rows left out: each {reason} (first: {})", dropped["rows"], dropped["first"]);
        }
        println!("  {:19} {}", "seconds per step", last["seconds"]["total"]);
        memory(&status["memory"]);
    } else {
        println!("no step is finished yet");
    }
    match Store::open(directory) {
        Err(StoreError::InUse { owner, .. }) => println!("running as process {owner}"),
        Err(e) => return Err(e.into()),
        Ok((store, repairs)) => {
            println!("not running");
            for repair in repairs {
                println!("  repaired: {}", repair.0);
            }
            for c in store.checkpoints()? {
                println!("  checkpoint of step {:6}: {} tensors, {:.1} MB", c.step, c.tensors, c.bytes as f64 / 1e6);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints the measured peak of memory and the predicted one by part.
fn memory(memory: &Value) {
    let megabytes = |v: &Value| v.as_f64().map(|bytes| bytes / 1e6);
    if let Some(measured) = megabytes(&memory["measured_peak"]) {
        println!("  {:19} {measured:.0} MB at most", "memory");
    }
    let predicted = &memory["predicted"];
    if let Some(peak) = megabytes(&predicted["peak"]) {
        let parts = ["weights", "reference", "moments", "gradients", "activations", "generation"];
        let part = |name| format!("{name} {:.0}", megabytes(&predicted[name]).unwrap_or_default());
        let parts: Vec<String> = parts.into_iter().map(part).collect();
        println!("  {:19} {peak:.0} MB: {}", "memory, predicted", parts.join(", "));
    }
}

/// Checks every checksum of the store and prints what is damaged.
pub fn verify(directory: &Path) -> Result<ExitCode> {
    saved::require_job(directory)?;
    let (store, repairs) = Store::open(directory)?;
    for repair in repairs {
        println!("repaired: {}", repair.0);
    }
    let (wrong, right) = store.verify()?;
    for problem in &wrong {
        println!("damaged: {problem}");
    }
    println!("{right} records and checkpoints are intact, {} damaged", wrong.len());
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}
