//! `rehearsal check`: what would become of a job.

use std::path::Path;
use std::process::ExitCode;

use super::print::{note, say};
use super::{saved, status};
use crate::driver::MODEL_FOLDER;
use crate::error::Result;
use crate::job::{Chain, Checked, Config, Job};

/// Characters of a row that are shown.
const SHOWN: usize = 600;

/// Reads everything that the jobs of a file read, and prints what was found. Nothing is written.
pub fn check(file: &Path, values: &[String]) -> Result<ExitCode> {
    let chain = Chain::load_with(file, values)?;
    let several = chain.stages().len() > 1;
    for warning in chain.stages().iter().flat_map(Config::warnings) {
        note!("warning: {warning}");
    }
    for (at, config) in chain.stages().iter().enumerate() {
        if several {
            say!("{}stage {}", if at > 0 { "\n" } else { "" }, config.common.job.directory.display());
        }
        // A stage may start from the models of those before it.
        if chain.stages()[..at].iter().any(|earlier| !earlier.common.job.directory.join(MODEL_FOLDER).is_dir()) {
            say!("  can be checked once the stages before it are done");
            continue;
        }
        show(&saved::block_on(Job::builder(config.clone()).check())?, config);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(checked: &Checked, config: &Config) {
    let Checked { algorithm, parameters, rows, steps, .. } = checked;
    say!("  {:19} {algorithm}, {steps} steps", "algorithm");
    say!("  {:19} {:.2} M parameters", "model", *parameters as f64 / 1e6);
    say!("  {:19} {rows} rows", "data");
    for (reason, dropped) in &checked.dropped.0 {
        say!("  {:19} {} rows: each {reason} (first: {})", "left out", dropped.rows, dropped.first);
    }
    let devices: Vec<String> = checked.devices.iter().map(ToString::to_string).collect();
    say!("  {:19} {}", "devices", devices.join(", "));
    if let Some(budget) = &checked.memory {
        status::predicted(budget);
    }
    let directory = config.common.job.directory.display();
    match checked.exists {
        true => say!("  {:19} {directory} holds a job; `rehearsal resume` continues it", "directory"),
        false => say!("  {:19} {directory}, to be created", "directory"),
    }
    for (row, texts) in checked.first.iter().enumerate() {
        for text in texts {
            let more = if text.chars().count() > SHOWN { " ..." } else { "" };
            let start: String = text.chars().take(SHOWN).collect();
            say!("\n  row {row} as the model reads it:\n    {}{more}", start.trim_end().replace('\n', "\n    "));
        }
    }
}
