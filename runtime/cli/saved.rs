//! Jobs and models as the command line names them.

use std::path::Path;

use rehearsal_lm::Checkpoint;
use rehearsal_store::Store;

use crate::access::JobReader;
use crate::config::ModelSource;
use crate::error::{Error, Result};
use crate::models::{dated, load_model};
use crate::time::today;

/// Runs a future to its end.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Runtime::new().map_err(Error::Threads)?;
    runtime.block_on(future)
}

/// Whether a path is the directory of a job or of a ledger.
pub fn is_job(path: &Path) -> bool {
    Store::exists(path)
}

/// Opens a model: `embedded`, a model directory or file, or the directory of a job, for the policy that it trains.
pub fn model(name: &str) -> Result<Checkpoint> {
    let path = Path::new(name);
    if is_job(path) {
        // Not in the job's directory, which this process may have no right to write to.
        let scratch = std::env::temp_dir().join(format!("rehearsal-model-{}", std::process::id()));
        return block_on(async { JobReader::open(path).await?.model(&scratch).await });
    }
    let source = if name == "embedded" { ModelSource::Embedded } else { ModelSource::Path(path.into()) };
    Ok(dated(load_model(&source)?, Some(today())))
}
