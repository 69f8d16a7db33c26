//! A job of several processes: rank 0 runs it, the others answer it.

use std::process::ExitCode;

use rehearsal_actors::{Devices, Ranks, launched_ranks, threads_of_rank};

use crate::error::Result;
use crate::job::Chain;

/// What this process does.
pub enum Part {
    /// It runs the job, with the others if there are any.
    Lead(Option<Launched>),
    /// It has answered the job, which has ended.
    #[cfg_attr(not(feature = "mpi"), expect(dead_code, reason = "without MPI there are no others"))]
    Served(ExitCode),
}

/// The processes that a launcher has started.
pub struct Launched {
    pub devices: Devices,
    ranks: Ranks,
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.ranks.stop();
    }
}

/// This process's part of a job.
pub fn part(chain: &Chain) -> Result<Part> {
    let Some(launched) = launched_ranks() else { return Ok(Part::Lead(None)) };
    let threads = chain.stages().first().map_or(0, |stage| stage.common.placement.shared_threads());
    join(launched, threads_of_rank(threads))
}

#[cfg(feature = "mpi")]
fn join(_launched: usize, threads: usize) -> Result<Part> {
    use rehearsal_actors::{MpiWire, Wire, serve};
    let wire = MpiWire::new()?;
    if wire.rank() == 0 {
        let ranks = Ranks::new(Box::new(wire));
        let devices = Devices::new(threads)?.with_ranks(ranks.clone());
        return Ok(Part::Lead(Some(Launched { devices, ranks })));
    }
    // The first signal is rank 0's, which saves the job and ends all.
    let _ignored = super::run::cancel_on_signal();
    serve(&wire, threads)?;
    Ok(Part::Served(ExitCode::SUCCESS))
}

#[cfg(not(feature = "mpi"))]
fn join(launched: usize, _threads: usize) -> Result<Part> {
    use crate::config::{ConfigError, Problem};
    use crate::features::MPI;
    let message = format!("this is one of {launched} processes of a launcher; a job of several processes needs {MPI}");
    Err(ConfigError::new(vec![Problem { line: 0, message }]).into())
}
