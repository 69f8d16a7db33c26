//! `rehearsal generate`: one completion, by a model or by the policy of a job.

use std::path::Path;
use std::process::ExitCode;

use super::print::say;
use super::saved;
use crate::access::{Generate, JobReader, complete};
use crate::error::Result;

/// Generates a completion and prints it.
pub fn generate(model: &str, request: Generate) -> Result<ExitCode> {
    let path = Path::new(model);
    let generated = if saved::is_job(path) {
        saved::block_on(async { JobReader::open(path).await?.generate(request).await })?
    } else {
        complete(&saved::model(model)?, &request, 0)?
    };
    say!("{}", generated.text);
    Ok(ExitCode::SUCCESS)
}
