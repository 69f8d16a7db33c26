//! `rehearsal status` and `rehearsal verify`.

use std::path::Path;
use std::process::ExitCode;

use rehearsal_store::{Error as StoreError, Store};
use serde_json::Value;

use super::{DAMAGED, saved};
use crate::error::Result;

pub fn status(directory: &Path) -> Result<ExitCode> {
    saved::is_job(directory)?;
    let status = std::fs::read(directory.join("status.json")).ok();
    let status: Option<Value> = status.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if let Some(status) = &status {
        println!("step {} of {}, newest checkpoint {}", status["step"], status["steps"], status["checkpoint"]);
        let last = &status["last"];
        for key in ["reward", "kl", "loss", "accuracy", "completion_tokens", "mismatch_kl"] {
            println!("  {key:18} {}", last[key]);
        }
        println!("  {:18} {}", "seconds per step", last["seconds"]["total"]);
    } else {
        println!("no step is done yet");
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

pub fn verify(directory: &Path) -> Result<ExitCode> {
    saved::is_job(directory)?;
    let (store, repairs) = Store::open(directory)?;
    for repair in repairs {
        println!("repaired: {}", repair.0);
    }
    let (wrong, right) = store.verify()?;
    for problem in &wrong {
        println!("damaged: {problem}");
    }
    println!("{right} records and checkpoints are whole, {} damaged", wrong.len());
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}
