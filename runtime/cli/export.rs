//! `rehearsal export`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use candle_core::DType;
use rehearsal_store::Store;

use super::saved;
use crate::error::{At, Error, Result};

pub fn export(directory: &Path, model: Option<&Path>, dtype: &str, ledger: Option<&Path>) -> Result<ExitCode> {
    if model.is_none() && ledger.is_none() {
        return Err(Error::State("say what to export: --model DIR, --ledger FILE, or both".into()));
    }
    saved::is_job(directory)?;
    let (store, _) = Store::open(directory)?;
    if let Some(out) = model {
        let checkpoint = saved::policy(directory, &store)?;
        let dtype = match dtype {
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            _ => DType::F32,
        };
        checkpoint.save(&checkpoint.parameters, out, dtype)?;
        eprintln!("wrote the model to {}", out.display());
    }
    if let Some(out) = ledger {
        let (pairs, ties) = if out == Path::new("-") {
            store.export_preferences(&mut std::io::stdout().lock())?
        } else {
            let mut file = BufWriter::new(File::create(out).at(out)?);
            let counts = store.export_preferences(&mut file)?;
            file.flush().at(out)?;
            counts
        };
        eprintln!("wrote {pairs} pairs ({ties} ties left out)");
    }
    Ok(ExitCode::SUCCESS)
}
