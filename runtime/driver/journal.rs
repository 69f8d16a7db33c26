//! The files in a job's directory that people and other programs read: `history.jsonl` and `status.json`.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::blocking::blocking;
use crate::error::{At, Result};
use crate::status::{JobStatus, STATUS_FILE};

/// Writes a job's files, off the host's async threads.
pub struct Journal {
    directory: PathBuf,
}

impl Journal {
    /// The files of a job's directory.
    pub fn new(directory: &Path) -> Self {
        Self { directory: directory.into() }
    }

    fn history(&self) -> PathBuf {
        self.directory.join("history.jsonl")
    }

    /// Appends the line of a step.
    pub async fn append(&self, line: &Value) -> Result<()> {
        let (path, line) = (self.history(), line.to_string());
        blocking(move || {
            let mut file = fs::File::options().create(true).append(true).open(&path).at(&path)?;
            writeln!(file, "{line}").at(&path)
        })
        .await
    }

    /// Drops the lines of steps after `step`, and returns the last one that stays.
    pub async fn cut(&self, step: u64) -> Result<Value> {
        let path = self.history();
        blocking(move || {
            let Ok(text) = fs::read_to_string(&path) else { return Ok(Value::Null) };
            let (mut kept, mut last) = (String::new(), Value::Null);
            for line in text.lines() {
                // A line that a kill cut short is dropped.
                let Ok(row) = serde_json::from_str::<Value>(line) else { continue };
                if row["step"].as_u64().is_some_and(|at| at <= step) {
                    kept.extend([line, "\n"]);
                    last = row;
                }
            }
            replace(&path, &kept)?;
            Ok(last)
        })
        .await
    }

    /// Replaces the status. `status` is called where it may read files.
    pub async fn status(&self, status: impl FnOnce() -> JobStatus + Send + 'static) -> Result<()> {
        let path = self.directory.join(STATUS_FILE);
        blocking(move || replace(&path, &json!(status()).to_string())).await
    }

    /// Writes out a batch whose loss or gradient was not finite; returns where.
    pub async fn offending_batch(&self, step: u64, report: String) -> Result<PathBuf> {
        let path = self.directory.join(format!("offending-batch-{step}.txt"));
        let written = path.clone();
        blocking(move || fs::write(&written, report).at(&written)).await?;
        Ok(path)
    }
}

/// Replaces a file in one move, so that a reader sees the old or the new one.
fn replace(path: &Path, text: &str) -> Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text).at(&temporary)?;
    fs::rename(&temporary, path).at(path)
}
