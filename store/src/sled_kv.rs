//! sled 0.34.7, with what its use has taught.
//!
//! - `flush()` alone does not survive a power cut: `sync_all` on its `db` file follows.
//! - A kill during open can leave `snap.*.generating`, and open then fails until it is gone.
//! - A damaged snapshot can be set aside; a damaged log may panic or silently lose its tail. A sentinel file with
//!   the last acknowledged sequence number exposes the latter.
//! - After an I/O error sled refuses everything until it is opened again.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::error::IoContext;
use crate::kv::{Changes, Entry, KeyValue};
use crate::{Error, Repair, Result};

const SEQUENCE: &[u8] = b"!sequence";
const CACHE_BYTES: u64 = 64 << 20;

pub struct SledKv {
    db: Option<sled::Db>,
    path: PathBuf,
    log: File,
    sentinel: File,
    sentinel_path: PathBuf,
    acknowledged: u64,
    /// Set by a failed write: sled must be opened again before it is used.
    broken: bool,
}

impl SledKv {
    /// Opens or creates `directory/store`.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Repair>)> {
        let path = directory.join("store");
        let mut repairs = Vec::new();
        remove_half_made_snapshots(&path, &mut repairs)?;
        let db = match open_db(&path) {
            Ok(db) => db,
            Err(Error::Database { .. }) if set_snapshots_aside(&path, &mut repairs)? => open_db(&path)?,
            Err(e) => return Err(e),
        };
        sync_directories(&path, directory)?;
        let log_path = path.join("db");
        let log = File::open(&log_path).at(&log_path)?;
        let sentinel_path = directory.join("store.sentinel");
        let sentinel =
            File::options().create(true).truncate(false).read(true).write(true).open(&sentinel_path).at(&sentinel_path)?;
        let mut kv = Self { db: Some(db), path, log, sentinel, sentinel_path, acknowledged: 0, broken: false };
        let (found, acknowledged) = (kv.sequence()?, kv.read_sentinel());
        if found < acknowledged {
            return Err(Error::Lost { path: kv.path, found, acknowledged });
        }
        kv.acknowledged = found;
        Ok((kv, repairs))
    }

    fn db(&self) -> Result<&sled::Db> {
        self.db.as_ref().ok_or_else(|| Error::Database { path: self.path.clone(), reason: "it is closed".into() })
    }

    fn sequence(&self) -> Result<u64> {
        let value = self.get(SEQUENCE)?;
        Ok(value.and_then(|v| v.try_into().ok()).map_or(0, u64::from_be_bytes))
    }

    fn read_sentinel(&self) -> u64 {
        let mut bytes = [0; 8];
        match self.sentinel.read_exact_at(&mut bytes, 0) {
            Ok(()) => u64::from_be_bytes(bytes),
            Err(_) => 0, // a new store
        }
    }

    /// Opens the database again after a failed write, which sled itself never recovers from.
    fn reopen(&mut self) -> Result<()> {
        drop(self.db.take());
        let mut ignored = Vec::new();
        remove_half_made_snapshots(&self.path, &mut ignored)?;
        self.db = Some(open_db(&self.path)?);
        let log_path = self.path.join("db");
        self.log = File::open(&log_path).at(&log_path)?;
        self.acknowledged = self.sequence()?;
        self.broken = false;
        Ok(())
    }

    fn write(&self, changes: &Changes, sequence: u64) -> Result<()> {
        let mut batch = sled::Batch::default();
        for (key, value) in &changes.0 {
            match value {
                Some(value) => batch.insert(key.as_slice(), value.as_slice()),
                None => batch.remove(key.as_slice()),
            }
        }
        batch.insert(SEQUENCE, &sequence.to_be_bytes());
        let db = self.db()?;
        self.guard(|| db.apply_batch(batch).and_then(|()| db.flush().map(|_| ())))?;
        self.log.sync_all().at(&self.path)?;
        self.sentinel.write_all_at(&sequence.to_be_bytes(), 0).at(&self.sentinel_path)?;
        self.sentinel.sync_data().at(&self.sentinel_path)
    }

    fn guard<T>(&self, f: impl FnOnce() -> sled::Result<T>) -> Result<T> {
        guard(&self.path, f)
    }
}

impl KeyValue for SledKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let db = self.db()?;
        Ok(self.guard(|| db.get(key))?.map(|v| v.to_vec()))
    }

    fn apply(&mut self, changes: Changes) -> Result<()> {
        if self.broken {
            self.reopen()?;
        }
        let sequence = self.acknowledged + 1;
        match self.write(&changes, sequence) {
            Ok(()) => {
                self.acknowledged = sequence;
                Ok(())
            }
            Err(e) => {
                self.broken = true;
                Err(e)
            }
        }
    }

    fn scan<'a>(&'a self, prefix: &[u8]) -> Result<Box<dyn Iterator<Item = Result<Entry>> + 'a>> {
        let entries = self.db()?.scan_prefix(prefix);
        let own = |key: &[u8]| key != SEQUENCE;
        Ok(Box::new(
            entries
                .map(move |entry| guard(&self.path, || entry).map(|(k, v)| (k.to_vec(), v.to_vec())))
                .filter(move |entry| entry.as_ref().map_or(true, |(k, _)| own(k))),
        ))
    }
}

fn open_db(path: &Path) -> Result<sled::Db> {
    let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).use_compression(false).flush_every_ms(Some(500));
    guard(path, || config.open())
}

/// sled reports some damage by panicking; here that is an error like any other.
fn guard<T>(path: &Path, f: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(source))) => Err(source).at(path),
        Ok(Err(e)) if e.to_string().contains("StorageFull") || e.to_string().contains("No space left") => {
            Err(Error::DiskFull { path: path.into() })
        }
        Ok(Err(e)) => Err(Error::Database { path: path.into(), reason: e.to_string() }),
        Err(panic) => {
            let reason = panic.downcast_ref::<String>().cloned();
            let reason = reason.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            Err(Error::Database { path: path.into(), reason: reason.unwrap_or_else(|| "it panicked".into()) })
        }
    }
}

fn files(path: &Path, matches: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).at(path)? {
        let file = entry.at(path)?.path();
        if file.file_name().and_then(|n| n.to_str()).is_some_and(&matches) {
            found.push(file);
        }
    }
    Ok(found)
}

fn remove_half_made_snapshots(path: &Path, repairs: &mut Vec<Repair>) -> Result<()> {
    for file in files(path, |name| name.ends_with(".generating"))? {
        fs::remove_file(&file).at(&file)?;
        repairs.push(Repair(format!("removed {}, which a killed process left half-made", file.display())));
    }
    Ok(())
}

/// Whether there was a snapshot to set aside; sled then rebuilds it from the log.
fn set_snapshots_aside(path: &Path, repairs: &mut Vec<Repair>) -> Result<bool> {
    let snapshots = files(path, |name| name.starts_with("snap."))?;
    for file in &snapshots {
        let aside = path.with_file_name(format!("damaged-{}", file.file_name().unwrap_or_default().to_string_lossy()));
        fs::rename(file, &aside).at(file)?;
        repairs.push(Repair(format!("set the damaged snapshot {} aside and rebuilt it from the log", aside.display())));
    }
    Ok(!snapshots.is_empty())
}

/// The entries of a new store must survive too, not only their contents.
fn sync_directories(path: &Path, parent: &Path) -> Result<()> {
    let conf = path.join("conf");
    for file in [conf.as_path(), &path.join("blobs"), path, parent] {
        if file.exists() {
            File::open(file).and_then(|f| f.sync_all()).at(file)?;
        }
    }
    Ok(())
}
