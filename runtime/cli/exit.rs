//! Exit codes of the command.

use crate::error::Error;

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
    match error {
        Error::Config(_) | Error::Prompts { .. } | Error::NoReward | Error::Rules(_) | Error::Exists(_) => WRONG_INPUT,
        Error::Usage(_) | Error::NothingToResume(_) | Error::Changed { .. } | Error::Model(_) => WRONG_INPUT,
        _ => FAILED,
    }
}
