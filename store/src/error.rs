//! Errors of the store.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{directory} is in use by process {owner}; only one process may work on a job at a time")]
    InUse { directory: PathBuf, owner: String },
    #[error("no space left on the disk of {path}; acknowledged data is safe, free some space to go on")]
    DiskFull { path: PathBuf },
    #[error("the database in {path} is open in another process; stop the job or program that uses it, then try again")]
    Locked { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the database in {path} failed: {reason}")]
    Database { path: PathBuf, reason: String },
    #[error("{what} is damaged: {reason}")]
    Corrupt { what: String, reason: String },
    #[error(
        "the database in {path} has lost acknowledged records: it stands at write {found} and {acknowledged} were \
         acknowledged; restore the directory from a copy"
    )]
    Lost { path: PathBuf, found: u64, acknowledged: u64 },
    #[error(
        "{what} was written by a newer version of this program (record version {found}; this one reads up to {known}); upgrade to read it"
    )]
    TooNew { what: String, found: u8, known: u8 },
    #[error("there is no checkpoint of step {0}")]
    NoCheckpoint(u64),
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
