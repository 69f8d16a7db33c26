//! The index on sled 0.34.7, with workarounds for sled's defects.
//!
//! - A kill during open can leave `snap.*.generating`, with which the next open fails; it is removed first.
//! - A damaged database may panic instead of failing, or lose its tail without an error, and fails or panics when a damaged
//!   page is read.
//! - A lock may outlive its process by a moment, so opening waits for it.
//! - After an I/O error sled fails every request until it is opened again.

use std::fs;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::IoContext;
use crate::index::{Index, IndexFiles};
use crate::kv::{Entry, WriteBatch};
use crate::{Error, Result};

const NUMBER: &[u8] = b"!sequence";
const CACHE_BYTES: u64 = 8 << 20;

/// The directory of the database.
pub struct SledFiles {
    path: PathBuf,
}

impl SledFiles {
    pub fn new(directory: &Path) -> Self {
        Self { path: directory.join("store") }
    }
}

impl IndexFiles for SledFiles {
    fn open(&self) -> Result<Box<dyn Index>> {
        for file in partial_snapshots(&self.path)? {
            fs::remove_file(&file).at(&file)?;
        }
        Ok(Box::new(SledIndex { db: Some(open_db(&self.path)?), path: self.path.clone() }))
    }

    fn set_aside(&self) -> Result<Option<PathBuf>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let name = |n: u32| self.path.with_file_name(format!("store.damaged-{n}"));
        let aside = (1..).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(0));
        fs::rename(&self.path, &aside).at(&self.path)?;
        Ok(Some(aside))
    }

    fn remove(&self) -> Result<()> {
        if self.path.exists() { fs::remove_dir_all(&self.path).at(&self.path) } else { Ok(()) }
    }

    fn size(&self) -> Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(&self.path).at(&self.path)? {
            // sled deletes snapshots while this runs.
            bytes += entry.at(&self.path)?.metadata().map_or(0, |m| m.len());
        }
        Ok(bytes)
    }
}

pub struct SledIndex {
    /// `None` once it is dropped.
    db: Option<sled::Db>,
    path: PathBuf,
}

impl SledIndex {
    fn guarded<T>(&self, f: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Result<T> {
        let closed = || Error::Database { path: self.path.clone(), reason: "it is closed".into() };
        let db = self.db.as_ref().ok_or_else(closed)?;
        guard(&self.path, || f(db))
    }
}

impl Drop for SledIndex {
    fn drop(&mut self) {
        let db = self.db.take();
        // sled writes when it is dropped, which may panic where it is damaged. What counts is in the journal.
        let _ = catch_unwind(AssertUnwindSafe(move || drop(db)));
    }
}

impl Index for SledIndex {
    fn number(&self) -> Result<u64> {
        let value = self.guarded(|db| db.get(NUMBER))?;
        Ok(value.and_then(|v| v.as_ref().try_into().ok()).map_or(0, u64::from_be_bytes))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.guarded(|db| db.get(key))?.map(|v| v.to_vec()))
    }

    fn apply(&mut self, writes: &WriteBatch, number: Option<u64>) -> Result<()> {
        let mut batch = sled::Batch::default();
        for (key, value) in &writes.0 {
            match value {
                Some(value) => batch.insert(key.as_slice(), value.as_slice()),
                None => batch.remove(key.as_slice()),
            }
        }
        if let Some(number) = number {
            batch.insert(NUMBER, &number.to_be_bytes());
        }
        self.guarded(|db| db.apply_batch(batch))
    }

    fn page(&self, from: Bound<&[u8]>, prefix: &[u8], len: usize) -> Result<Vec<Entry>> {
        self.guarded(|db| {
            let mut page = Vec::new();
            for entry in db.range::<&[u8], _>((from, Bound::Unbounded)) {
                let (key, value) = entry?;
                if !key.starts_with(prefix) || page.len() == len {
                    break;
                }
                if key != NUMBER {
                    page.push((key.to_vec(), value.to_vec()));
                }
            }
            Ok(page)
        })
    }
}

fn open_db(path: &Path) -> Result<sled::Db> {
    let config =
        sled::Config::new().path(path).cache_capacity(CACHE_BYTES).use_compression(false).flush_every_ms(Some(500));
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match guard(path, || config.open()) {
            Err(Error::Locked { .. }) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            opened => return opened,
        }
    }
}

/// How long opening waits for a lock that is held elsewhere.
///
/// A child process holds this process's files, and with them this lock, between fork and exec; and a killed process
/// holds its lock until the kernel has released it.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// Calls sled and converts its errors, and the panics by which it reports some kinds of damage.
fn guard<T>(path: &Path, f: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        // sled tells this apart from other errors by its message only.
        Ok(Err(e)) if e.to_string().contains("could not acquire lock") => Err(Error::Locked { path: path.into() }),
        Ok(Err(sled::Error::Io(source))) => Err(source).at(path),
        Ok(Err(e)) if e.to_string().contains("StorageFull") || e.to_string().contains("No space left") => {
            Err(Error::DiskFull { path: path.into() })
        }
        Ok(Err(e)) => Err(Error::Database { path: path.into(), reason: e.to_string() }),
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().cloned();
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            Err(Error::Database { path: path.into(), reason: reason.unwrap_or_else(|| "sled panicked".into()) })
        }
    }
}

fn partial_snapshots(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).at(path)? {
        let file = entry.at(path)?.path();
        if file.extension().is_some_and(|extension| extension == "generating") {
            found.push(file);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(directory: &Path) -> Result<Box<dyn Index>> {
        SledFiles::new(directory).open()
    }

    #[test]
    fn opening_waits_for_a_lock_and_then_fails() {
        let directory = tempfile::tempdir().unwrap();
        let held = open(directory.path()).unwrap();
        let error = open(directory.path()).err().expect("an error");
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let soon = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(held);
        });
        open(directory.path()).unwrap();
        soon.join().unwrap();
    }

    #[test]
    fn a_partial_snapshot_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()).unwrap());
        let left = directory.path().join("store/snap.0000000000000001.generating");
        fs::write(&left, b"half").unwrap();
        open(directory.path()).unwrap();
        assert!(!left.exists());
    }
}
