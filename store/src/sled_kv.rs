//! The database on sled 0.34.7, with workarounds for sled's defects.
//!
//! - `flush()` alone does not survive a power loss, so `sync_all` on sled's `db` file follows it.
//! - A kill during open can leave `snap.*.generating`, with which the next open fails; it is removed first.
//! - A damaged snapshot can be renamed, and sled rebuilds it from the log. A damaged log may panic, or lose its tail
//!   without an error; a sentinel file with the sequence number of the last acknowledged write detects the loss.
//! - A lock may outlive its process by a moment, so opening waits for it.
//! - After an I/O error sled fails every request until it is opened again.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::IoContext;
use crate::kv::{Entry, KeyValue, WriteBatch};
use crate::{Error, Repair, Result};

const SEQUENCE: &[u8] = b"!sequence";
const CACHE_BYTES: u64 = 64 << 20;

pub struct SledKv {
    path: PathBuf,
    sentinel: File,
    sentinel_path: PathBuf,
    /// Replaced when sled has to be opened again. One thread owns the store, so the cell is never contended.
    state: RefCell<State>,
}

struct State {
    /// `None` after a failed write, from which sled does not recover until it is opened again.
    db: Option<Open>,
    /// Sequence number of the last acknowledged write.
    acknowledged: u64,
}

#[derive(Clone)]
struct Open {
    db: sled::Db,
    log: Arc<File>,
}

impl SledKv {
    /// Opens or creates `directory/store`.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Repair>)> {
        let path = directory.join("store");
        let mut repairs = Vec::new();
        let open = match Open::new(&path, &mut repairs) {
            Ok(open) => open,
            Err(Error::Database { .. }) if set_damaged_snapshots_aside(&path, &mut repairs)? => {
                Open::new(&path, &mut repairs)?
            }
            Err(e) => return Err(e),
        };
        sync_directories(&path, directory)?;
        let sentinel_path = directory.join("store.sentinel");
        let sentinel = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&sentinel_path)
            .at(&sentinel_path)?;
        let (found, acknowledged) = (open.sequence(&path)?, read_sentinel(&sentinel).at(&sentinel_path)?);
        if found < acknowledged {
            return Err(Error::Lost { path, found, acknowledged });
        }
        let state = RefCell::new(State { db: Some(open), acknowledged: found });
        Ok((Self { path, sentinel, sentinel_path, state }, repairs))
    }

    /// The open database. After a failed write it is opened again first.
    fn database(&self) -> Result<Open> {
        let mut state = self.state.borrow_mut();
        if let Some(open) = &state.db {
            return Ok(open.clone());
        }
        let open = Open::new(&self.path, &mut Vec::new())?;
        state.acknowledged = open.sequence(&self.path)?;
        state.db = Some(open.clone());
        Ok(open)
    }

    fn write(&self, open: &Open, writes: &WriteBatch, sequence: u64) -> Result<()> {
        let mut batch = sled::Batch::default();
        for (key, value) in &writes.0 {
            match value {
                Some(value) => batch.insert(key.as_slice(), value.as_slice()),
                None => batch.remove(key.as_slice()),
            }
        }
        batch.insert(SEQUENCE, &sequence.to_be_bytes());
        guard(&self.path, || open.db.apply_batch(batch).and_then(|()| open.db.flush().map(|_| ())))?;
        open.log.sync_all().at(&self.path)?;
        self.sentinel.write_all_at(&sequence.to_be_bytes(), 0).at(&self.sentinel_path)?;
        self.sentinel.sync_data().at(&self.sentinel_path)
    }
}

impl Open {
    fn new(path: &Path, repairs: &mut Vec<Repair>) -> Result<Self> {
        remove_partial_snapshots(path, repairs)?;
        let db = open_db(path)?;
        let log_path = path.join("db");
        Ok(Self { db, log: Arc::new(File::open(&log_path).at(&log_path)?) })
    }

    fn sequence(&self, path: &Path) -> Result<u64> {
        let value = guard(path, || self.db.get(SEQUENCE))?;
        Ok(value.and_then(|v| v.as_ref().try_into().ok()).map_or(0, u64::from_be_bytes))
    }
}

/// The sequence number in the sentinel file; 0 for the empty file of a new store.
fn read_sentinel(sentinel: &File) -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    match sentinel.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(u64::from_be_bytes(bytes)),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(0),
        Err(e) => Err(e),
    }
}

impl KeyValue for SledKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let open = self.database()?;
        Ok(guard(&self.path, || open.db.get(key))?.map(|v| v.to_vec()))
    }

    fn apply(&mut self, batch: WriteBatch) -> Result<()> {
        let open = self.database()?;
        let sequence = self.state.borrow().acknowledged + 1;
        let written = self.write(&open, &batch, sequence);
        let mut state = self.state.borrow_mut();
        match &written {
            Ok(()) => state.acknowledged = sequence,
            Err(_) => state.db = None,
        }
        written
    }

    fn scan<'a>(&'a self, prefix: &[u8]) -> Result<Box<dyn Iterator<Item = Result<Entry>> + 'a>> {
        let entries = self.database()?.db.scan_prefix(prefix);
        let is_record = |key: &[u8]| key != SEQUENCE;
        Ok(Box::new(
            entries
                .map(move |entry| guard(&self.path, || entry).map(|(k, v)| (k.to_vec(), v.to_vec())))
                .filter(move |entry| entry.as_ref().map_or(true, |(k, _)| is_record(k))),
        ))
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

fn remove_partial_snapshots(path: &Path, repairs: &mut Vec<Repair>) -> Result<()> {
    for file in files(path, |name| name.ends_with(".generating"))? {
        fs::remove_file(&file).at(&file)?;
        repairs.push(Repair(format!("removed {}, a partial snapshot of a killed process", file.display())));
    }
    Ok(())
}

/// Renames snapshots, so that sled rebuilds them from the log. Returns whether there were any.
fn set_damaged_snapshots_aside(path: &Path, repairs: &mut Vec<Repair>) -> Result<bool> {
    let snapshots = files(path, |name| name.starts_with("snap."))?;
    for file in &snapshots {
        let aside = path.with_file_name(format!("damaged-{}", file.file_name().unwrap_or_default().to_string_lossy()));
        fs::rename(file, &aside).at(file)?;
        repairs.push(Repair(format!("renamed a damaged snapshot to {} and rebuilt it from the log", aside.display())));
    }
    Ok(!snapshots.is_empty())
}

/// Makes the directory entries of a new store durable, not only the files' contents.
fn sync_directories(path: &Path, parent: &Path) -> Result<()> {
    let conf = path.join("conf");
    for file in [conf.as_path(), &path.join("blobs"), path, parent] {
        if file.exists() {
            File::open(file).and_then(|f| f.sync_all()).at(file)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryKv;

    /// Everything in a map, in order.
    fn all(kv: &dyn KeyValue) -> Vec<Entry> {
        kv.scan(b"").unwrap().collect::<Result<_>>().unwrap()
    }

    #[test]
    fn sled_agrees_with_a_map_across_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let mut model = MemoryKv::default();
        let mut state = 12345u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let (mut kv, _) = SledKv::open(directory.path()).unwrap();
        for round in 0..120 {
            let mut batch = WriteBatch::default();
            for _ in 0..random(6) {
                let key = format!("{}/{}", ["a", "b", "ab"][random(3) as usize], random(20)).into_bytes();
                match random(3) {
                    0 => batch.remove(key),
                    _ => batch.put(key, vec![round as u8; random(5000) as usize]),
                }
            }
            model.apply(batch.clone()).unwrap();
            kv.apply(batch).unwrap();
            if random(10) == 0 {
                drop(kv);
                kv = SledKv::open(directory.path()).unwrap().0;
            }
        }
        assert!(!all(&model).is_empty());
        assert_eq!(all(&kv), all(&model));
        for prefix in [b"a".as_slice(), b"a/", b"ab/", b"c"] {
            let of = |kv: &dyn KeyValue| kv.scan(prefix).unwrap().collect::<Result<Vec<_>>>().unwrap();
            assert_eq!(of(&kv), of(&model));
        }
        assert_eq!(kv.get(b"a/1").unwrap(), model.get(b"a/1").unwrap());
    }

    #[test]
    fn opening_waits_for_a_lock_and_then_fails() {
        let directory = tempfile::tempdir().unwrap();
        let (held, _) = SledKv::open(directory.path()).unwrap();
        let error = SledKv::open(directory.path()).err().expect("an error");
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let soon = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(held);
        });
        SledKv::open(directory.path()).unwrap();
        soon.join().unwrap();
    }

    #[test]
    fn a_partial_snapshot_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        drop(SledKv::open(directory.path()).unwrap());
        let left = directory.path().join("store/snap.0000000000000001.generating");
        fs::write(&left, b"half").unwrap();
        let (_, repairs) = SledKv::open(directory.path()).unwrap();
        assert!(!left.exists());
        assert!(repairs[0].0.contains("partial"), "{repairs:?}");
    }

    #[test]
    fn the_loss_of_acknowledged_writes_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (mut kv, _) = SledKv::open(directory.path()).unwrap();
        for i in 0..3u8 {
            let mut batch = WriteBatch::default();
            batch.put(vec![i], vec![i]);
            kv.apply(batch).unwrap();
        }
        drop(kv);
        // An empty database in place of the one that the sentinel belongs to, as after an incomplete copy.
        fs::remove_dir_all(directory.path().join("store")).unwrap();
        let error = SledKv::open(directory.path()).err().expect("an error").to_string();
        assert!(error.contains("stands at write 0 and 3 were acknowledged"), "{error}");
    }
}
