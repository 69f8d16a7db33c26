//! The files in a job's directory that people and other programs read: `history.jsonl`, `evaluations.jsonl` and
//! `status.json`.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rehearsal_actors::Waits;
use rehearsal_store::{Disk, Files as _, replace};
use serde_json::{Value, json};

use crate::blocking::blocking;
use crate::error::{At, Result};
use crate::status::{JobStatus, STATUS_FILE};

/// A file with a line for each of something.
#[derive(Debug, Clone, Copy)]
pub enum Log {
    /// Steps.
    History,
    /// Evaluations.
    Evaluations,
}

/// Writes a job's files, off the host's async threads.
#[derive(Clone)]
pub struct Journal {
    directory: PathBuf,
    waits: Waits,
    /// Work on a file fails when it takes longer.
    deadline: Duration,
}

impl Journal {
    /// The files of a job's directory.
    pub fn new(directory: &Path, waits: Waits, deadline: Duration) -> Self {
        Self { directory: directory.into(), waits, deadline }
    }

    /// Work on files, which may wait for a disk, a server or, where the system has no more threads, for ever.
    async fn work<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _wait = self.waits.enter("files", what);
        let late =
            || io::Error::new(io::ErrorKind::TimedOut, format!("{what} took longer than `limits.request_seconds`"));
        match tokio::time::timeout(self.deadline, blocking(work)).await {
            Ok(done) => done,
            Err(_) => Err(late()).at(&self.directory),
        }
    }

    fn log(&self, log: Log) -> PathBuf {
        self.directory.join(match log {
            Log::History => "history.jsonl",
            Log::Evaluations => "evaluations.jsonl",
        })
    }

    /// Appends a line, whose `step` is a step of the job.
    pub async fn append(&self, log: Log, line: &Value) -> Result<()> {
        let (path, line) = (self.log(log), line.to_string());
        self.work("append to a log", move || {
            let mut file = fs::File::options().create(true).append(true).open(&path).at(&path)?;
            writeln!(file, "{line}").at(&path)
        })
        .await
    }

    /// Makes all lines durable: those of steps that a checkpoint has are not written again.
    pub async fn sync(&self) -> Result<()> {
        let (directory, logs) = (self.directory.clone(), [Log::History, Log::Evaluations].map(|log| self.log(log)));
        self.work("sync the logs", move || {
            for path in logs.iter().filter(|path| path.exists()) {
                fs::File::open(path).and_then(|file| file.sync_data()).at(path)?;
            }
            Disk.sync_directory(&directory).at(&directory)
        })
        .await
    }

    /// Drops the lines of steps after `step`, and returns the last one that stays and how many lines are damaged. Those are
    /// dropped too, and the file as it was is kept beside it.
    pub async fn cut(&self, log: Log, step: u64) -> Result<(Value, usize)> {
        let path = self.log(log);
        self.work("cut a log", move || {
            let bytes = match fs::read(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((Value::Null, 0)),
                bytes => bytes.at(&path)?,
            };
            let (mut kept, mut last, mut damaged) = (Vec::new(), Value::Null, 0);
            for line in bytes.split_inclusive(|byte| *byte == b'\n') {
                let row = serde_json::from_slice::<Value>(line).ok().filter(|row| row["step"].is_u64());
                match row {
                    Some(row) if row["step"].as_u64() <= Some(step) => {
                        kept.extend_from_slice(line);
                        last = row;
                    }
                    Some(_) => {}
                    // A kill cuts the last line short.
                    None => damaged += usize::from(line.ends_with(b"\n")),
                }
            }
            if damaged > 0 {
                let aside = path.with_extension("damaged.jsonl");
                fs::copy(&path, &aside).at(&aside)?;
            }
            replace(&Disk, &path, &kept).at(&path)?;
            Ok((last, damaged))
        })
        .await
    }

    /// Replaces the status. `status` is called where it may read files.
    pub async fn status(&self, status: impl FnOnce() -> JobStatus + Send + 'static) -> Result<()> {
        let path = self.directory.join(STATUS_FILE);
        self.work("write the status", move || replace(&Disk, &path, json!(status()).to_string().as_bytes()).at(&path))
            .await
    }

    /// Writes out a batch whose loss or gradient was not finite; returns where.
    pub async fn offending_batch(&self, step: u64, report: String) -> Result<PathBuf> {
        let path = self.directory.join(format!("offending-batch-{step}.txt"));
        let written = path.clone();
        self.work("write a report", move || fs::write(&written, report).at(&written)).await?;
        Ok(path)
    }
}
