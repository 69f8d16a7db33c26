//! What can end a job.

use std::path::PathBuf;

/// Why a job could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    #[error("{file}: {message}")]
    Prompts { file: PathBuf, message: String },
    #[error(
        "the configuration names no rules and the program brings no reward; set `reward.rules` or give the builder a reward"
    )]
    NoReward,
    #[error("reward rules: {0}")]
    Rules(String),
    #[error("{0} holds a job already; go on with it by `resume`, or name another `job.directory`")]
    Exists(PathBuf),
    #[error("{0} holds no job; start one by `run`")]
    NothingToResume(PathBuf),
    #[error(
        "the job in {directory} was started with other settings, and a resumed job must do what it would have done:\n{differences}"
    )]
    Changed { directory: PathBuf, differences: String },
    #[error("the job has ended")]
    Ended,
    #[error("this job trains a reward model, which generates no text")]
    NoPolicy,
    #[error("{0} is not empty and holds no model; name another directory")]
    NotAModelDirectory(PathBuf),
    #[error("the process that runs the job in {directory} does not answer: {reason}")]
    Unreachable { directory: PathBuf, reason: String },
    #[error("{0}")]
    Refused(String),
    #[error("{error}; the batch is in {path}")]
    Offending { path: PathBuf, error: Box<Error> },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{what} cannot be served on {address}: {reason}")]
    Listen { what: &'static str, address: std::net::SocketAddr, reason: String },
    #[error(transparent)]
    Metric(#[from] crate::metrics::Undeclared),
    #[error("{0}")]
    Usage(String),
    #[error("the job's saved state cannot be read: {0}")]
    State(String),
    #[error("{0}; this is a defect of the program")]
    Internal(String),
    #[error(transparent)]
    Role(#[from] rehearsal_actors::Error),
    #[error(transparent)]
    Model(#[from] rehearsal_lm::Error),
    #[error(transparent)]
    Store(#[from] rehearsal_store::Error),
}

impl Error {
    /// Whether the job was asked to stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        use rehearsal_actors::{Error as Role, RewardError};
        matches!(self, Error::Role(Role::Cancelled | Role::Reward(RewardError::Stopped { .. })))
    }

    /// Whether a judge has been asked all that it may be.
    pub(crate) fn is_spent(&self) -> bool {
        matches!(self, Error::Role(rehearsal_actors::Error::Reward(rehearsal_actors::RewardError::Budget { .. })))
    }

    /// Whether a role died, so that the job goes on from its last checkpoint.
    pub(crate) fn is_death(&self) -> bool {
        matches!(self, Error::Role(e) if e.is_death())
    }
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) trait At<T> {
    fn at(self, path: &std::path::Path) -> Result<T>;
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, path: &std::path::Path) -> Result<T> {
        self.map_err(|source| Error::Io { path: path.into(), source })
    }
}
