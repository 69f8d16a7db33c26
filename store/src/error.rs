//! Errors of the store.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process owns the directory.
    #[error("{directory} is in use by process {owner}; only one process may work on a job at a time")]
    InUse {
        /// The directory.
        directory: PathBuf,
        /// Id of the process, if it is known.
        owner: String,
    },
    /// The disk is full. Acknowledged data are safe.
    #[error("no space left on the disk of {path}; acknowledged data is safe, free some space to go on")]
    DiskFull {
        /// The file or directory that was written.
        path: PathBuf,
    },
    /// Another process has the database open.
    #[error("the database in {path} is open in another process; stop the job or program that uses it, then try again")]
    Locked {
        /// Directory of the database.
        path: PathBuf,
    },
    /// An I/O operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system reports.
        source: io::Error,
    },
    /// The database failed.
    #[error("the database in {path} failed: {reason}")]
    Database {
        /// Directory of the database.
        path: PathBuf,
        /// What it reports.
        reason: String,
    },
    /// A record or checkpoint is damaged.
    #[error("{what} is damaged: {reason}")]
    Corrupt {
        /// Which one.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The weights to be saved are no numbers.
    #[error(
        "the model has diverged: `{tensor}` holds a NaN or an infinity after step {step}, so no checkpoint is made of it; \
         resume from the one before it with a lower `optimizer.learning_rate`"
    )]
    NotFinite {
        /// Step after which it was to be saved.
        step: u64,
        /// Name of the tensor.
        tensor: String,
    },
    /// A record has a version that this build does not know.
    #[error(
        "{what} was written by a newer version of this program (record version {found}; this one reads up to {known}); upgrade to read it"
    )]
    TooNew {
        /// Which one.
        what: String,
        /// Its version.
        found: u8,
        /// Newest version that this build reads.
        known: u8,
    },
    /// There is no checkpoint of this step.
    #[error("there is no checkpoint of step {0}")]
    NoCheckpoint(u64),
    /// A record cannot be encoded.
    #[error("a record cannot be written: {0}")]
    Encode(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Converts I/O errors into errors with a path, and those of a full disk into [`Error::DiskFull`].
pub(crate) trait IoContext<T> {
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { path: path.into() },
            _ => Error::Io { path: path.into(), source },
        })
    }
}
