//! `rehearsal export` and `rehearsal import`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use clap::{Args, ValueEnum};
use rehearsal_store::{Prompt, Query, Store};

use super::saved;
use crate::data::ledger::{self, Shape};
use crate::data::write;
use crate::error::{Error, Result};

#[derive(Args)]
pub struct Export {
    /// The job's directory, or one that `label` or `import` filled.
    directory: PathBuf,
    /// Write the newest checkpoint's policy as a Hugging Face directory.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Type of the written weights.
    #[arg(long, default_value = "f32", value_parser = ["f32", "f16", "bf16"])]
    dtype: String,
    /// Write the preference ledger as JSON Lines, or as Parquet to a file of that ending; `-` for standard output.
    #[arg(long)]
    ledger: Option<PathBuf>,
    /// What a row of the ledger's file is.
    #[arg(long, value_enum, default_value = "pairs")]
    rows: Rows,
    #[command(flatten)]
    which: Which,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rows {
    /// TRL's `prompt`, `chosen`, `rejected`, with scores.
    Pairs,
    /// `prompt`, `completions`, `ranks`.
    Rankings,
    /// `prompt`, `completion`: what people wrote.
    Demonstrations,
    /// Everything, with who was asked what, in which order, and what it cost.
    Verdicts,
}

/// Which verdicts are wanted.
#[derive(Args)]
struct Which {
    /// From this step on.
    #[arg(long)]
    from_step: Option<u64>,
    /// To this step.
    #[arg(long)]
    to_step: Option<u64>,
    /// Of judges with this in their names.
    #[arg(long)]
    judge: Option<String>,
    /// On this prompt, a text.
    #[arg(long)]
    prompt: Option<String>,
    /// Where orders or judges are at least so far apart, from 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    disagreement: f64,
}

impl Which {
    fn query(self) -> Query {
        let steps = self.from_step.unwrap_or(0)..self.to_step.map_or(u64::MAX, |to| to.saturating_add(1));
        let prompt = self.prompt.map(Prompt::Text);
        Query { steps: Some(steps), prompt, judge: self.judge, disagreement_min: self.disagreement }
    }
}

pub fn export(export: Export) -> Result<ExitCode> {
    let Export { directory, model, dtype, ledger, rows, which } = export;
    if model.is_none() && ledger.is_none() {
        return Err(Error::Usage("say what to export: --model DIR, --ledger FILE, or both".into()));
    }
    saved::is_job(&directory)?;
    let (store, _) = Store::open(&directory)?;
    if let Some(out) = model {
        let checkpoint = saved::policy(&directory, &store)?;
        let dtype = match dtype.as_str() {
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            _ => DType::F32,
        };
        checkpoint.save(&checkpoint.parameters, &out, dtype)?;
        eprintln!("wrote the model to {}", out.display());
    }
    if let Some(out) = ledger {
        let (shape, name) = match rows {
            Rows::Pairs => (Shape::Pairs, "pairs"),
            Rows::Rankings => (Shape::Rankings, "rankings"),
            Rows::Demonstrations => (Shape::Demonstrations, "demonstrations"),
            Rows::Verdicts => (Shape::Verdicts, "verdicts"),
        };
        let (mut written, mut others) = (Vec::new(), 0);
        for preference in store.query(which.query())? {
            match ledger::row(&preference?, shape) {
                Some(row) => written.push(row),
                None => others += 1,
            }
        }
        if written.is_empty() {
            return Err(Error::Usage(format!("the ledger has no {name} of that kind ({others} verdicts are none)")));
        }
        write::write(&written, &out, &mut std::io::stdout().lock())?;
        eprintln!("wrote {} {name} ({others} left out: ties, or of another kind)", written.len());
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds files to the ledger of a directory, which is made where there is none.
pub fn import(directory: &Path, files: &[PathBuf], judge: &str) -> Result<ExitCode> {
    let (mut store, _) = Store::open(directory)?;
    for file in files {
        let (rows, dropped) = ledger::import(&mut store, file, judge)?;
        eprintln!("{}: {rows} rows into the ledger of {}", file.display(), directory.display());
        for (reason, rows) in &dropped.0 {
            eprintln!("  left out: {} that {reason}, {} first", rows.rows, rows.first);
        }
    }
    Ok(ExitCode::SUCCESS)
}
