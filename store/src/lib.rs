//! What must survive: checkpoints, rollouts, the preference ledger and job state.
//!
//! This crate alone knows sled. It holds bytes and records, no tensors: a checkpoint's data are byte slices with a
//! type, a shape and a name. What a call returned `Ok` for survives the process and the power.

mod checkpoint;
mod error;
mod header;
mod key;
mod kv;
mod ledger;
mod record;
mod rollout;
mod shards;
mod sled_kv;

pub use checkpoint::{CheckpointSummary, LoadedCheckpoint, OwnedTensor, SavedCheckpoint, TensorBytes};
pub use error::{Error, Result};
pub use header::ModelCounters;
pub use kv::{Changes, KeyValue, MemoryKv};
pub use ledger::{Exchange, KeptReply, Preference, Prompt, Query, Turn, Usage};
pub use rollout::{Rollout, Verdict};

use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};

use crate::error::IoContext;
use crate::shards::Shards;

/// Something the store repaired or set aside while opening; worth telling the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair(pub String);

/// The store of one job, in one directory, owned by one process and meant for one thread.
pub struct Store {
    kv: Box<dyn KeyValue>,
    shards: Shards,
    directory: PathBuf,
    /// Held open for the lock.
    _lock: Option<File>,
}

impl Store {
    /// Opens or creates the store of a job directory, repairing what a killed process may have left.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Repair>)> {
        fs::create_dir_all(directory).at(directory)?;
        let lock = lock(directory)?;
        let (kv, mut repairs) = sled_kv::SledKv::open(directory)?;
        let mut store = Self {
            kv: Box::new(kv),
            shards: Shards::open(&directory.join("checkpoints"))?,
            directory: directory.into(),
            _lock: Some(lock),
        };
        repairs.extend(store.adopt_orphans()?);
        Ok((store, repairs))
    }

    /// A store over any key-value map, for tests; shards lie in `directory`.
    pub fn with_kv(kv: Box<dyn KeyValue>, directory: &Path) -> Result<Self> {
        Ok(Self { kv, shards: Shards::open(&directory.join("checkpoints"))?, directory: directory.into(), _lock: None })
    }

    /// The job directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps a named piece of job state, replacing what had the name.
    pub fn put_job<T: Serialize>(&mut self, name: &str, value: &T) -> Result<()> {
        let mut changes = Changes::default();
        record::put(&mut changes, key::job(name), record::JOB, value)?;
        self.kv.apply(changes)
    }

    /// A named piece of job state.
    pub fn get_job<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let plain: Option<record::Plain<T>> = record::get(&*self.kv, &key::job(name), record::JOB)?;
        Ok(plain.map(|p| p.0))
    }

    /// Reads everything back and checks every checksum; returns what is wrong, and how many records are right.
    pub fn verify(&self) -> Result<(Vec<String>, u64)> {
        let mut wrong = Vec::new();
        let mut right = 0;
        for entry in self.kv.scan(b"")? {
            let (key, value) = entry?;
            if key.first() == Some(&b'#') || key.first() == Some(&b't') || key::is_index(&key) {
                continue; // parts are checked with the record they belong to, tensors with their checkpoint
            }
            match record::check(&*self.kv, &key, &value) {
                Ok(()) => right += 1,
                Err(e) => wrong.push(e.to_string()),
            }
        }
        for summary in self.checkpoints()? {
            match self.load_checkpoint(summary.step) {
                Ok(_) => right += 1,
                Err(e) => wrong.push(e.to_string()),
            }
        }
        Ok((wrong, right))
    }
}

/// Takes the job directory for this process, or says who has it.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join("job.lock");
    let mut file = File::options().create(true).truncate(false).read(true).write(true).open(&path).at(&path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let owner = fs::read_to_string(&path).unwrap_or_default();
            return Err(Error::InUse { directory: directory.into(), owner: owner.trim().to_string() });
        }
        Err(TryLockError::Error(source)) => return Err(Error::Io { path, source }),
    }
    // The number is for people; the lock is what counts.
    file.set_len(0).at(&path)?;
    writeln!(file, "{}", std::process::id()).at(&path)?;
    Ok(file)
}
