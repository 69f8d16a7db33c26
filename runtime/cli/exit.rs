//! Exit codes of the command.

use crate::error::{Error, ErrorKind};

/// The job failed.
pub const FAILED: u8 = 1;
/// The command line, the configuration or a file is wrong.
pub const WRONG_INPUT: u8 = 2;
/// `verify` found damage.
pub const DAMAGED: u8 = 3;
/// A signal stopped the job.
pub const STOPPED: u8 = 130;

/// Exit code of an error.
pub fn code(error: &Error) -> u8 {
    match (error.kind(), error) {
        (ErrorKind::Input, _) => WRONG_INPUT,
        // A device that this machine or build does not have was named in the configuration.
        (_, Error::Role(rehearsal_actors::Error::Placement { .. })) => WRONG_INPUT,
        _ => FAILED,
    }
}
