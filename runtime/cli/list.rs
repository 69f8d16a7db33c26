//! `rehearsal list`: the jobs of a directory.

use std::path::Path;
use std::process::ExitCode;

use super::print::say;
use super::saved;
use crate::access;
use crate::error::Result;

/// Prints a line for each job in a directory, or in its folders.
pub fn list(directory: &Path) -> Result<ExitCode> {
    let jobs = access::jobs_in(directory)?;
    if jobs.is_empty() {
        say!("{} has no job", directory.display());
        return Ok(ExitCode::SUCCESS);
    }
    say!("{:32} {:14} {:>15} {:12} {:>9} {:>9}", "directory", "algorithm", "step", "state", "reward", "loss");
    saved::block_on(async {
        for path in jobs {
            let name = path.strip_prefix(directory).unwrap_or(&path).display().to_string();
            let name = if name.is_empty() { path.display().to_string() } else { name };
            let (status, running) = match access::glance(&path).await {
                Ok(glance) => glance,
                Err(e) => {
                    say!("{name:32} {e}");
                    continue;
                }
            };
            let state = match (running, status.is_done()) {
                (true, _) if status.paused => "paused",
                (true, _) if !status.waiting.is_empty() => "waits",
                (true, _) => "runs",
                (false, true) => "done",
                (false, false) => "stopped",
            };
            let number = |key: &str| status.last[key].as_f64().map_or("-".into(), |x| format!("{x:.4}"));
            let step = format!("{} of {}", status.step, status.steps);
            let algorithm = if status.algorithm.is_empty() { "-" } else { &status.algorithm };
            say!("{name:32} {algorithm:14} {step:>15} {state:12} {:>9} {:>9}", number("reward"), number("loss"));
        }
        Ok(ExitCode::SUCCESS)
    })
}
