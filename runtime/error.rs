//! What can end a job.

use std::path::PathBuf;

/// Why a job could not start or go on. [`Error::kind`] sorts the variants.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration is wrong: all its problems.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// A file of rows or prompts cannot be used.
    #[error("{file}: {message}")]
    Prompts {
        /// The file.
        file: PathBuf,
        /// What is wrong, with the row or line.
        message: String,
    },
    /// The algorithm needs a reward, and there is none.
    #[error(
        "the configuration names no rules and the program brings no reward; set `reward.rules` or give the builder a reward"
    )]
    NoReward,
    /// A source of rewards cannot be used.
    #[error("`{name}`: {reason}")]
    RewardSource {
        /// The source, as the configuration names it.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The directory holds a job already.
    #[error("{0} holds a job already; go on with it by `resume`, or name another `job.directory`")]
    Exists(PathBuf),
    /// The directory holds no job.
    #[error("{0} holds no job; start one by `run`")]
    NothingToResume(PathBuf),
    /// The interrupted job had other settings or inputs.
    #[error(
        "the job in {directory} was started with other settings, and a resumed job must do what it would have done:\n{differences}"
    )]
    Changed {
        /// Directory of the job.
        directory: PathBuf,
        /// Every difference, with both values.
        differences: String,
    },
    /// The job of a handle has ended.
    #[error("the job has ended; `JobReader::open` reads its directory")]
    Ended,
    /// There is nothing to generate with.
    #[error("this job trains a reward model, which generates no text")]
    NoPolicy,
    /// A directory to be replaced by a model holds something else.
    #[error("{0} is not empty and holds no model; name another directory")]
    NotAModelDirectory(PathBuf),
    /// An argument, option or request is wrong.
    #[error("{0}")]
    Usage(String),
    /// The process that runs a job was asked and gave no answer.
    #[error(
        "the process that runs the job in {directory} does not answer: {reason}; if it hangs, stop it and resume the job"
    )]
    Unreachable {
        /// Directory of the job.
        directory: PathBuf,
        /// What failed.
        reason: String,
    },
    /// The process that runs a job refused a request.
    #[error("{message}")]
    Refused {
        /// The kind of its error.
        kind: ErrorKind,
        /// Its message.
        message: String,
    },
    /// A step failed; its batch was written to a file.
    #[error("{error}; the batch is in {path}")]
    Offending {
        /// The file with the batch.
        path: PathBuf,
        /// What failed.
        error: Box<Error>,
    },
    /// A file or directory cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system reports.
        source: std::io::Error,
    },
    /// An address cannot be listened on.
    #[error("{what} cannot be served on {address}: {reason}")]
    Listen {
        /// What is served there.
        what: &'static str,
        /// The address.
        address: std::net::SocketAddr,
        /// What failed, and what to do.
        reason: String,
    },
    /// Nodes generate for the job, and cannot go on.
    #[error("nodes: {0}")]
    Nodes(String),
    /// A node's coordinator was not there.
    #[error(
        "the coordinator at {join} was not there for {seconds} s: {reason}; see that its job runs, or give `--patience`"
    )]
    Coordinator {
        /// The coordinator's address.
        join: String,
        /// How long the node waited.
        seconds: u64,
        /// What failed last.
        reason: String,
    },
    /// The system starts no more threads.
    #[error("the system starts no threads for the program: {0}; free resources and try again")]
    Threads(std::io::Error),
    /// A step reported a statistic that is not declared.
    #[error(transparent)]
    Metric(#[from] crate::metrics::Undeclared),
    /// What the job saved cannot be read.
    #[error("the job's saved state cannot be read: {reason}; resume it with the version of the program that wrote it")]
    SavedState {
        /// What is wrong with it.
        reason: String,
    },
    /// A defect of the program.
    #[error("{0}; this is a defect of the program")]
    Internal(String),
    /// A role failed.
    #[error(transparent)]
    Role(#[from] rehearsal_actors::Error),
    /// A model failed, or cannot be read.
    #[error(transparent)]
    Model(#[from] rehearsal_lm::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] rehearsal_store::Error),
}

/// What kind of thing went wrong, and so who can mend it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// Settings, files or requests are wrong: correct them. Nothing was lost.
    Input,
    /// A role failed: a reward, a model, a numerical failure. The last checkpoint stays; mend the cause and resume.
    Role,
    /// The store, or the disk beneath it: see the message; `rehearsal verify` says what is damaged.
    Store,
    /// A device cannot be used, or failed.
    Device,
    /// The job was asked to stop, or has ended.
    Cancelled,
    /// The system refused something: an address, threads, a file. Try again once it has been freed.
    System,
    /// A defect of the program.
    Internal,
}

impl Error {
    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        use ErrorKind::*;
        match self {
            Self::Config(_) | Self::Prompts { .. } | Self::NoReward | Self::RewardSource { .. } | Self::Exists(_) => {
                Input
            }
            Self::NothingToResume(_) | Self::Changed { .. } | Self::NoPolicy | Self::Usage(_) => Input,
            Self::NotAModelDirectory(_) => Input,
            Self::Ended => Cancelled,
            Self::Unreachable { .. } => Role,
            Self::Refused { kind, .. } => *kind,
            Self::Offending { error, .. } => error.kind(),
            Self::Io { source, .. } => of_io(source),
            Self::Listen { .. } | Self::Threads(_) => System,
            Self::Metric(_) | Self::Internal(_) => Internal,
            Self::SavedState { .. } => Store,
            Self::Role(e) => of_role(e),
            Self::Model(e) => of_model(e),
            Self::Nodes(_) | Self::Coordinator { .. } => Role,
            Self::Store(e) => of_store(e),
        }
    }

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

fn of_role(e: &rehearsal_actors::Error) -> ErrorKind {
    use rehearsal_actors::{Error as Role, RewardError};
    match e {
        Role::Cancelled | Role::Reward(RewardError::Stopped { .. }) => ErrorKind::Cancelled,
        Role::Placement { .. } | Role::Tensor(_) => ErrorKind::Device,
        Role::Store(e) => of_store(e),
        Role::Model(e) => of_model(e),
        _ => ErrorKind::Role,
    }
}

fn of_model(e: &rehearsal_lm::Error) -> ErrorKind {
    use rehearsal_lm::Error as Model;
    match e {
        Model::Cancelled => ErrorKind::Cancelled,
        Model::Tensor(_) => ErrorKind::Device,
        Model::Write { source, .. } => of_io(source),
        Model::NotFinite { .. } => ErrorKind::Role,
        _ => ErrorKind::Input,
    }
}

fn of_store(e: &rehearsal_store::Error) -> ErrorKind {
    match e {
        rehearsal_store::Error::Io { source, .. } => match of_io(source) {
            ErrorKind::Input => ErrorKind::Input,
            _ => ErrorKind::Store,
        },
        _ => ErrorKind::Store,
    }
}

/// A path that cannot be used as it was named is wrong input.
fn of_io(e: &std::io::Error) -> ErrorKind {
    use std::io::ErrorKind as Io;
    match e.kind() {
        Io::NotFound | Io::PermissionDenied | Io::InvalidData | Io::InvalidInput | Io::AlreadyExists => {
            ErrorKind::Input
        }
        Io::NotADirectory | Io::IsADirectory | Io::ReadOnlyFilesystem | Io::InvalidFilename => ErrorKind::Input,
        _ => ErrorKind::System,
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
