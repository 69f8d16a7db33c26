//! What can go wrong with the store.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{directory} is in use by process {owner}; one process works on a job at a time")]
    InUse { directory: PathBuf, owner: String },
    #[error("no room left on the disk of {path}; what was acknowledged is safe, free some space to go on")]
    DiskFull { path: PathBuf },
    #[error("the database in {path} is open elsewhere; stop the job or program that uses it, then try again")]
    Locked { path: PathBuf },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the database in {path} failed: {reason}")]
    Database { path: PathBuf, reason: String },
    #[error("{what} is damaged: {reason}")]
    Corrupt { what: String, reason: String },
    #[error(
        "the database in {path} lost acknowledged records: it stands at {found}, {acknowledged} were acknowledged; restore the directory from a copy"
    )]
    Lost { path: PathBuf, found: u64, acknowledged: u64 },
    #[error("{what} was written by a newer version ({found}; this one reads up to {known}); upgrade to read it")]
    TooNew { what: String, found: u8, known: u8 },
    #[error("there is no checkpoint of step {0}")]
    NoCheckpoint(u64),
    #[error("a record cannot be written: {0}")]
    Encode(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Turns an I/O error into one that names its path, and a full disk into its own error.
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
