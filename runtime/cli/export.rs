//! `rehearsal export` and `rehearsal import`: models and preferences in the formats of Hugging Face and TRL.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use rehearsal_store::{Prompt, Query, Store};

use super::print::note;
use super::saved;
use crate::access::{JobReader, WeightType};
use crate::data;
use crate::data::ledger::{self, Shape};
use crate::error::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  rehearsal export runs/quickstart --model out --dtype bf16
  rehearsal export runs/quickstart --ledger pairs.parquet
  rehearsal export labels --ledger - --rows rankings --judge person:anna")]
pub struct Export {
    /// Directory of a job, or a directory that `label` or `import` created
    directory: PathBuf,
    /// Write the policy to this Hugging Face directory: of a running job as it is after the step under way, else of the
    /// newest checkpoint
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Type of the written weights
    #[arg(long, value_name = "f32|f16|bf16", default_value = "f32")]
    dtype: WeightType,
    /// Write the preference ledger to this file: Parquet if it ends in .parquet, else JSON Lines; `-` is standard
    /// output
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Kind of the ledger's rows
    #[arg(long, value_enum, default_value = "pairs")]
    rows: Rows,
    #[command(flatten)]
    filter: LedgerFilter,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rows {
    /// `prompt`, `chosen`, `rejected` and their scores
    Pairs,
    /// `prompt`, `completions`, `ranks` and scores
    Rankings,
    /// `prompt`, `completion`, of demonstrations that people wrote
    Demonstrations,
    /// Whole records, with every exchange with a judge, its display order and its cost
    Verdicts,
}

/// Selects records of the ledger.
#[derive(Args)]
struct LedgerFilter {
    /// First step
    #[arg(long)]
    from_step: Option<u64>,
    /// Last step
    #[arg(long)]
    to_step: Option<u64>,
    /// Only records whose judge has this in its name
    #[arg(long)]
    judge: Option<String>,
    /// Only records of this prompt, which is a text
    #[arg(long)]
    prompt: Option<String>,
    /// Only records on which display orders or judges disagree at least this much, from 0 to 1
    #[arg(long, default_value_t = 0.0)]
    disagreement: f64,
}

impl LedgerFilter {
    fn query(self) -> Query {
        let steps = self.from_step.unwrap_or(0)..self.to_step.map_or(u64::MAX, |to| to.saturating_add(1));
        let prompt = self.prompt.map(Prompt::Text);
        Query { steps: Some(steps), prompt, judge: self.judge, disagreement_min: self.disagreement, ..Query::default() }
    }
}

/// Writes the model, the ledger or both.
pub fn export(export: Export) -> Result<ExitCode> {
    let Export { directory, model, dtype, ledger, rows, filter } = export;
    if model.is_none() && ledger.is_none() {
        return Err(Error::Usage("nothing to export is named; add --model DIR, --ledger FILE, or both".into()));
    }
    saved::block_on(async {
        let job = JobReader::open(&directory).await?;
        if let Some(out) = model {
            job.export(&out, dtype).await?;
            note!("wrote the model to {}", out.display());
        }
        match ledger {
            Some(out) => write_ledger(&job, &out, rows, filter.query()).await,
            None => Ok(()),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn write_ledger(job: &JobReader, out: &Path, rows: Rows, query: Query) -> Result<()> {
    let (shape, name) = match rows {
        Rows::Pairs => (Shape::Pairs, "pairs"),
        Rows::Rankings => (Shape::Rankings, "rankings"),
        Rows::Demonstrations => (Shape::Demonstrations, "demonstrations"),
        Rows::Verdicts => (Shape::Verdicts, "verdicts"),
    };
    let records = job.preferences(query).await?;
    let records = if shape == Shape::Verdicts { records } else { ledger::standing(records) };
    let written: Vec<_> = records.iter().filter_map(|record| ledger::row(record, shape)).collect();
    let others = records.len() - written.len();
    if written.is_empty() {
        return Err(Error::Usage(format!(
            "the ledger has no {name} of that kind; {others} other records match the filter"
        )));
    }
    data::write(&written, out, &mut std::io::stdout().lock())?;
    note!("wrote {} {name}; left out {others} records that are ties or of another kind", written.len());
    Ok(())
}

/// Adds the rows of files to the ledger of a directory, which is created if it does not exist.
pub fn import(directory: &Path, files: &[PathBuf], judge: &str) -> Result<ExitCode> {
    let (mut store, _) = Store::open(directory)?;
    for file in files {
        let (rows, dropped) = ledger::import(&mut store, file, judge)?;
        note!("{}: added {rows} rows to the ledger of {}", file.display(), directory.display());
        for (reason, rows) in &dropped.0 {
            note!("  left out {} rows, each of which {reason}; {} first", rows.rows, rows.first);
        }
    }
    Ok(ExitCode::SUCCESS)
}
