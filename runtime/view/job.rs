//! One job that is shown.

use std::fs;
use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rehearsal_store::{Preference, Prompt, Query};
use serde::Serialize;
use serde_json::{Value, json};

use super::curves::Curves;
use super::index::{Filter, Index};
use crate::access::{self, Control, JobReader, Overrule, Score, ScoredTokens};
use crate::blocking::blocking;
use crate::error::{At, Error, Result};
use crate::status::JobStatus;

/// A stored job is closed when nobody has asked for so long, so that it can be resumed.
const IDLE: Duration = Duration::from_secs(2);
/// Time between two looks for new records, while somebody asks for them.
const REFRESH: Duration = Duration::from_secs(1);
/// Evaluations that are shown: the newest.
const EVALUATIONS_MAX: usize = 500;
/// Matches of a text that are listed at most.
const MATCHES_MAX: usize = 20_000;

/// A job, by its directory or by its handle in this process.
pub struct ShownJob {
    directory: PathBuf,
    /// Within the job's own process.
    live: Option<JobReader>,
    open: tokio::sync::Mutex<Option<Open>>,
    curves: Mutex<Curves>,
    index: Mutex<Indexed>,
}

/// A stored job that is kept open.
struct Open {
    reader: JobReader,
    used: Instant,
}

#[derive(Default)]
struct Indexed {
    index: Index,
    /// Whether all records that there were have been read.
    complete: bool,
    /// Whether somebody reads them now.
    reading: bool,
    read: Option<Instant>,
}

/// A job as the list shows it.
#[derive(Serialize)]
pub struct Glance {
    pub name: String,
    pub directory: String,
    pub running: bool,
    pub status: JobStatus,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ShownJob {
    /// A job by its directory.
    pub fn of(directory: &Path) -> Self {
        let (open, curves, index) = Default::default();
        Self { directory: directory.into(), live: None, open, curves, index }
    }

    /// A job that this process runs.
    pub fn live(reader: JobReader) -> Self {
        Self { live: Some(reader.clone()), ..Self::of(reader.directory()) }
    }

    /// The job's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How far the job is. The store stays closed.
    pub async fn glance(&self) -> Result<Glance> {
        let (status, running) = match &self.live {
            Some(reader) => (reader.status().await?, true),
            None => access::glance(&self.directory).await?,
        };
        let name = self.directory.file_name().unwrap_or(self.directory.as_os_str());
        Ok(Glance {
            name: name.to_string_lossy().into(),
            directory: self.directory.display().to_string(),
            running,
            status,
        })
    }

    /// The lines of the history after a step, with the number of steps between two of them.
    pub async fn curves(self: &Arc<Self>, after: u64) -> Result<Value> {
        let job = self.clone();
        blocking(move || {
            let mut curves = lock(&job.curves);
            let path = job.directory.join("history.jsonl");
            curves.refresh(&path).at(&path)?;
            Ok(json!({"stride": curves.stride(), "lines": curves.after(after)}))
        })
        .await
    }

    /// The newest evaluations, oldest first.
    pub async fn evaluations(&self) -> Result<Value> {
        let path = self.directory.join("evaluations.jsonl");
        blocking(move || {
            let file = match fs::File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(json!([])),
                file => file.at(&path)?,
            };
            let mut all = std::collections::VecDeque::new();
            for line in io::BufReader::new(file).lines() {
                if let Ok(row) = serde_json::from_str::<Value>(&line.at(&path)?) {
                    all.push_back(row);
                    if all.len() > EVALUATIONS_MAX {
                        all.pop_front();
                    }
                }
            }
            Ok(json!(all))
        })
        .await
    }

    /// A page of the records that pass a filter.
    pub async fn answers(self: &Arc<Self>, filter: &Filter, text: &str, offset: usize, limit: usize) -> Result<Value> {
        if !text.is_empty() {
            let (found, complete) = self.search(text).await?;
            return Ok(page(&found, complete, filter, offset, limit));
        }
        self.read_records();
        let indexed = lock(&self.index);
        Ok(page(&indexed.index, indexed.complete, filter, offset, limit))
    }

    /// The records with a text, and whether those are all.
    async fn search(&self, text: &str) -> Result<(Index, bool)> {
        let reader = self.reader().await?;
        let mut query = Query { text: Some(text.into()), ..Query::default() };
        let mut found = Index::default();
        loop {
            let page = reader.brief_page(query.clone()).await?;
            let Some(last) = page.last() else { return Ok((found, true)) };
            query.after = Some((last.step, last.index));
            found.add(page);
            if found.len() >= MATCHES_MAX {
                return Ok((found, false));
            }
        }
    }

    /// Reads new records in the background, unless somebody does or did a moment ago.
    fn read_records(self: &Arc<Self>) {
        {
            let mut indexed = lock(&self.index);
            if indexed.reading || indexed.read.is_some_and(|read| read.elapsed() < REFRESH) {
                return;
            }
            indexed.reading = true;
        }
        let job = self.clone();
        tokio::spawn(async move {
            let result = job.read_all().await;
            let mut indexed = lock(&job.index);
            indexed.reading = false;
            indexed.read = Some(Instant::now());
            match result {
                Ok(()) => indexed.complete = true,
                Err(e) => tracing::warn!("the ledger of {}: {e}", job.directory.display()),
            }
        });
    }

    async fn read_all(&self) -> Result<()> {
        // The records of a job that does not run do not change.
        let complete = lock(&self.index).complete;
        if complete && self.live.is_none() && !access::glance(&self.directory).await?.1 {
            return Ok(());
        }
        let reader = self.reader().await?;
        loop {
            let after = lock(&self.index).index.last();
            let page = reader.brief_page(Query { after, ..Query::default() }).await?;
            let more = page.iter().any(|p| p.overrules.is_none());
            lock(&self.index).index.add(page);
            if !more {
                return Ok(());
            }
        }
    }

    /// A record with its texts, and the one by which a person overruled it.
    pub async fn answer(&self, step: u64, index: u32) -> Result<Value> {
        let all = self.reader().await?.preferences(of_step(step)).await?;
        let find = |wanted: &dyn Fn(&&Preference) -> bool| all.iter().find(wanted);
        let record = find(&|p| p.index == index)
            .ok_or_else(|| Error::Usage(format!("the ledger has no record {index} of step {step}")))?;
        let person = find(&|p| p.overrules() == Some(index));
        let prompt = match &record.prompt {
            Prompt::Text(text) => json!([{"role": "user", "content": text}]),
            Prompt::Conversation(turns) => json!(turns),
        };
        Ok(json!({
            "step": record.step, "index": record.index, "row": record.row, "policy_version": record.policy_version,
            "prompt": prompt, "completions": record.completions, "scores": record.scores, "reasons": record.reasons,
            "pair": record.pair, "judge": record.judge, "exchanges": record.exchanges, "time_ms": record.time_ms,
            "disagreement": record.disagreement(),
            "overruled": person.map(|p| json!({"judge": p.judge, "ranks": p.ranks(), "time_ms": p.time_ms})),
        }))
    }

    /// How likely a completion of a record is, token by token.
    pub async fn score(&self, step: u64, index: u32, completion: usize) -> Result<ScoredTokens> {
        let reader = self.reader().await?;
        let all = reader.preferences(of_step(step)).await?;
        let missing =
            || Error::Usage(format!("the ledger has no completion {completion} of record {index} of step {step}"));
        let record = all.into_iter().find(|p| p.index == index).ok_or_else(missing)?;
        let completion = record.completions.get(completion).cloned().ok_or_else(missing)?;
        reader.score(Score { prompt: record.prompt, completion }).await
    }

    /// Writes a person's ranking in place of a record's.
    pub async fn overrule(&self, overrule: Overrule) -> Result<()> {
        let reader = self.reader().await?;
        let step = overrule.step;
        reader.overrule(overrule).await?;
        let changed = reader.brief_page(of_step(step)).await?;
        lock(&self.index).index.add(changed);
        Ok(())
    }

    /// Asks a running job to do something.
    pub async fn control(&self, control: Control) -> Result<Option<u64>> {
        self.reader().await?.control(control).await
    }

    /// Opens the job. One that does not run stays open for a moment.
    async fn reader(&self) -> Result<JobReader> {
        if let Some(live) = &self.live {
            return Ok(live.clone());
        }
        let mut open = self.open.lock().await;
        if let Some(open) = &mut *open {
            open.used = Instant::now();
            return Ok(open.reader.clone());
        }
        let reader = JobReader::open(&self.directory).await?;
        if !reader.is_running() {
            *open = Some(Open { reader: reader.clone(), used: Instant::now() });
        }
        Ok(reader)
    }

    /// Closes a stored job that nobody has asked for a while.
    pub async fn close_if_idle(&self) {
        let mut open = self.open.lock().await;
        if let Some(idle) = open.take_if(|open| open.used.elapsed() >= IDLE) {
            // Closing waits for the disk.
            blocking(move || drop(idle)).await;
        }
    }
}

/// The records of one step.
fn of_step(step: u64) -> Query {
    Query { steps: Some(step..step.saturating_add(1)), ..Query::default() }
}

fn page(index: &Index, complete: bool, filter: &Filter, offset: usize, limit: usize) -> Value {
    let (matched, listed) = index.list(filter, offset, limit);
    json!({"records": index.len(), "matched": matched, "complete": complete, "answers": listed})
}
