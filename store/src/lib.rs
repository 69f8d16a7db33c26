//! The durable store of a job: checkpoints, rollouts, the preference ledger, cached replies of judges and job state.
//!
//! This is the only crate that depends on sled. It stores bytes and records and knows no tensor library: a tensor is a
//! byte slice with a type, a shape and a name. What a call returned `Ok` for survives a crash and a power loss.
//!
//! ```
//! use rehearsal_store::{Preference, Prompt, Query, Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let directory = tempfile::tempdir()?;
//! let (mut store, repairs) = Store::open(directory.path())?;
//! assert!(repairs.is_empty());
//! store.log_preferences(&[Preference {
//!     prompt: Prompt::Text("What is the dog like?".into()),
//!     completions: vec!["Happy.".into(), "Ask someone else.".into()],
//!     scores: vec![1.0, 0.0],
//!     pair: Some((0, 1)),
//!     judge: "anna".into(),
//!     ..Preference::default()
//! }])?;
//! let by_anna = Query { judge: Some("anna".into()), ..Query::default() };
//! assert_eq!(store.query(by_anna)?.count(), 1);
//! # Ok(())
//! # }
//! ```

mod checkpoint;
mod durable;
mod error;
mod files;
mod frame;
mod header;
mod index;
mod journal;
mod key;
mod kv;
mod ledger;
#[cfg(test)]
mod properties;
mod record;
mod rollout;
mod sentinel;
mod shards;
#[cfg(test)]
mod simulation;
mod sled_kv;

pub use checkpoint::{CheckpointSummary, Keep, LoadedCheckpoint, OwnedTensor, SavedCheckpoint, TensorBytes};
pub use error::{Error, Result};
pub use files::{Disk, Files, beside, replace, replace_directory, replace_durably};
pub use header::ModelCounters;
pub use kv::{KeyValue, MemoryKv, WriteBatch};
pub use ledger::{CachedReply, Exchange, OVERRULES, Preference, Prompt, Query, Turn, Usage};
pub use rollout::{RolloutRecord, ScoreRecord};

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};

use crate::error::IoContext;
use crate::shards::Shards;

/// A message for the user about something that the store repaired, set aside or found damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair(pub String);

/// The store of one job in one directory. One process at a time owns it, and one thread uses it.
pub struct Store {
    kv: Box<dyn KeyValue>,
    shards: Shards,
    directory: PathBuf,
    /// Holds the lock on the directory while it is open.
    _lock: Option<File>,
}

impl Store {
    /// Opens or creates the store of a job directory, and repairs what a killed process or damage may have left. Returns
    /// messages on the repairs, with what is lost.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] or [`Error::Locked`] if another process uses the directory, and I/O errors.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Repair>)> {
        Disk.create_directory(directory).at(directory)?;
        let lock = lock(directory)?;
        let index = Box::new(sled_kv::SledFiles::new(directory));
        let kv = durable::Durable::open(directory, Arc::new(Disk), index, journal::boot())?;
        Self::assemble(Box::new(kv), directory, Arc::new(Disk), Some(lock))?.recovered()
    }

    /// The store with the checkpoints that its database has lost, where copies of their manifests are left, and messages on
    /// all repairs.
    fn recovered(mut self) -> Result<(Self, Vec<Repair>)> {
        let mut repairs = self.repairs();
        if !repairs.is_empty() || self.checkpoints()?.is_empty() {
            repairs.extend(self.restore_manifests()?);
        }
        Ok((self, repairs))
    }

    /// Whether a directory holds a store, or what is left of one.
    pub fn exists(directory: &Path) -> bool {
        let has_copy = |folder: &Path| {
            let names = Disk.list(folder).unwrap_or_default();
            names.iter().any(|name| checkpoint::is_manifest_copy(name))
        };
        directory.join("store").is_dir() || journal::exists(directory) || has_copy(&directory.join("checkpoints"))
    }

    /// A store over any key-value map, without a lock, for tests. Shards are files in `directory`.
    pub fn with_kv(kv: Box<dyn KeyValue>, directory: &Path) -> Result<Self> {
        Self::assemble(kv, directory, Arc::new(Disk), None)
    }

    fn assemble(kv: Box<dyn KeyValue>, directory: &Path, files: Arc<dyn Files>, lock: Option<File>) -> Result<Self> {
        let shards = Shards::open(&directory.join("checkpoints"), files)?;
        Ok(Self { kv, shards, directory: directory.into(), _lock: lock })
    }

    /// What was repaired since the last call, with what is lost.
    pub fn repairs(&self) -> Vec<Repair> {
        self.kv.repairs()
    }

    /// The job directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Stores a named value of job state, replacing one of the same name.
    pub fn put_job<T: Serialize>(&mut self, name: &str, value: &T) -> Result<()> {
        let mut batch = WriteBatch::default();
        record::put(&mut batch, key::job(name), record::JOB, value)?;
        self.kv.apply(batch)
    }

    /// Reads a named value of job state, if there is one.
    pub fn get_job<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let plain: Option<record::Plain<T>> = record::get(&*self.kv, &key::job(name), record::JOB)?;
        Ok(plain.map(|p| p.0))
    }

    /// Reads everything and verifies every checksum. Returns an error message for each damaged record, and the number of
    /// intact ones.
    pub fn verify(&self) -> Result<(Vec<String>, u64)> {
        let mut damaged = self.kv.verify()?;
        let mut intact = 0;
        for entry in self.kv.scan(b"")? {
            let (key, value) = entry?;
            if key.first() == Some(&b'#') || key.first() == Some(&b't') || key::is_index(&key) {
                continue; // parts are verified with their record, tensors with their checkpoint
            }
            match record::check(&*self.kv, &key, &value) {
                Ok(()) => intact += 1,
                Err(e) => damaged.push(e.to_string()),
            }
        }
        for summary in self.checkpoints()? {
            match self.load_checkpoint(summary.step) {
                Ok(_) => intact += 1,
                Err(e) => damaged.push(e.to_string()),
            }
        }
        damaged.extend(self.repairs().into_iter().map(|repair| repair.0));
        Ok((damaged, intact))
    }
}

/// Locks the job directory for this process, or returns an error with the owner's process id.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join("job.lock");
    let mut file = File::options().create(true).truncate(false).read(true).write(true).open(&path).at(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            // The owner may not have written its id yet.
            let owner = fs::read_to_string(&path).ok().map(|id| id.trim().to_string()).filter(|id| !id.is_empty());
            let owner = owner.unwrap_or_else(|| "(unknown)".into());
            return Err(Error::InUse { directory: directory.into(), owner });
        }
        Err(TryLockError::Error(source)) => return Err(Error::Io { path, source }),
    }
    // The id is for the error message only.
    file.set_len(0).at(&path)?;
    writeln!(file, "{}", std::process::id()).at(&path)?;
    Ok(file)
}
