//! The key-value map of a store: writes are durable in the [journal](crate::journal), reads come from the
//! [index](crate::index). An index that is damaged, or older than what the journal goes back to, is made again.

use std::cell::RefCell;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::files::Files;
use crate::index::{Index, IndexFiles};
use crate::journal::{Found, Journal};
use crate::kv::{Entries, Entry, KeyValue, WriteBatch};
use crate::sentinel::Sentinel;
use crate::{Error, Repair, Result};

/// Entries that a scan reads at a time.
const PAGE: usize = 64;
/// The index is made again when it is larger than this ...
const COMPACT_MIN_BYTES: u64 = 64 << 20;
/// ... and this many times as large as what it holds.
const COMPACT_FACTOR: u64 = 4;

pub struct Durable {
    path: PathBuf,
    sentinel: Sentinel,
    index_files: Box<dyn IndexFiles>,
    /// One thread owns the store, so the cell is never contended. Reads repair it.
    state: RefCell<State>,
}

struct State {
    /// `None` after an error, from which the index does not recover until it is opened again.
    index: Option<Box<dyn Index>>,
    journal: Journal,
    /// Number of the last write.
    number: u64,
    repairs: Vec<Repair>,
}

impl Durable {
    /// Opens or creates the map in a directory. What was repaired, and what is lost, is in [`KeyValue::repairs`].
    pub fn open(
        directory: &Path,
        files: Arc<dyn Files>,
        index_files: Box<dyn IndexFiles>,
        boot: [u8; 16],
    ) -> Result<Self> {
        let mut repairs = Vec::new();
        let (sentinel, acknowledged) = Sentinel::open(directory, files.clone(), &mut repairs)?;
        let mut journal = Journal::new(directory, files, boot);
        let found = journal.read()?;
        let mut state = State { index: None, journal, number: 0, repairs };
        match &found {
            Some(found) => state.recover(found, &*index_files)?,
            None => state.adopt(&*index_files)?,
        }
        if state.number < acknowledged {
            state.repairs.push(Repair(format!(
                "{} has lost acknowledged records: it stands at write {} and {acknowledged} were acknowledged; if a copy of \
                 the directory has them, stop, and restore it from there",
                directory.display(),
                state.number
            )));
            // Numbers are not used twice.
            state.number = acknowledged;
            if let Some(index) = &mut state.index {
                index.apply(&WriteBatch::default(), Some(acknowledged))?;
            }
            state.journal.close();
        }
        let path = directory.to_path_buf();
        let durable = Self { path, sentinel, index_files, state: RefCell::new(state) };
        durable.tidy()?;
        Ok(durable)
    }

    /// Folds the journal into its base if it cannot be appended to or is long, and makes an overgrown index again.
    fn tidy(&self) -> Result<()> {
        let state = self.state.borrow();
        if !state.journal.must_fold() && !state.journal.is_long() {
            return Ok(());
        }
        drop(state);
        self.fold()?;
        let limit = COMPACT_MIN_BYTES.max(COMPACT_FACTOR * self.state.borrow().journal.base_len());
        if self.index_files.size()? > limit {
            self.rebuild()?;
        }
        Ok(())
    }

    /// Writes all entries as the journal's new base.
    fn fold(&self) -> Result<()> {
        let state = self.state.borrow();
        let mut base = state.journal.begin_base(state.number)?;
        drop(state);
        // Damage that is met here is mended meanwhile.
        let written = self.scan(b"")?.try_for_each(|entry| base.push(entry?)).and_then(|()| base.end());
        let journal = &mut self.state.borrow_mut().journal;
        match written {
            Ok(()) => journal.put_base(base),
            Err(e) => {
                journal.drop_base(base);
                Err(e)
            }
        }
    }

    /// Reads; where the index is damaged, once more after it has been made again.
    fn reading<T>(&self, read: impl Fn(&dyn Index) -> Result<T>) -> Result<T> {
        let result = self.with_index(&read);
        let Err(Error::Database { reason, .. }) = &result else { return result };
        if !is_damage(reason) {
            return result;
        }
        let path = self.path.display();
        let message = format!("the database in {path} is damaged ({reason}) and was made again from the journal");
        self.state.borrow_mut().repairs.push(Repair(message));
        self.rebuild()?;
        self.with_index(&read)
    }

    fn with_index<T>(&self, read: impl Fn(&dyn Index) -> Result<T>) -> Result<T> {
        if self.state.borrow().index.is_none() {
            let mut state = self.state.borrow_mut();
            let found = state.journal.read()?.unwrap_or_default();
            state.recover(&found, &*self.index_files)?;
        }
        match &self.state.borrow().index {
            Some(index) => read(&**index),
            None => Err(Error::Database { path: self.path.clone(), reason: "it is closed".into() }),
        }
    }

    /// Makes the index again.
    fn rebuild(&self) -> Result<()> {
        let mut state = self.state.borrow_mut();
        let found = state.journal.read()?.unwrap_or_default();
        if state.rebuild(&found, &*self.index_files)? {
            return state.journal.go_on(&found);
        }
        state.journal.close();
        Ok(())
    }
}

impl State {
    /// Takes a directory of a build that had no journal, or a new one: what the index holds is all there is.
    fn adopt(&mut self, files: &dyn IndexFiles) -> Result<()> {
        let index = match files.open() {
            Err(Error::Database { path, reason }) if is_damage(&reason) => {
                let aside = files.set_aside()?.unwrap_or_default();
                self.repairs.push(Repair(format!(
                    "the database in {} cannot be opened ({reason}): what it held is lost but for what lies beside it; it was \
                     moved to {}",
                    path.display(),
                    aside.display()
                )));
                files.open()?
            }
            other => other?,
        };
        self.number = index.number()?;
        self.index = Some(index);
        Ok(())
    }

    /// Opens the index and gives it the writes that it lacks, or makes it again.
    fn recover(&mut self, found: &Found, files: &dyn IndexFiles) -> Result<()> {
        self.index = None;
        if found.same_boot && self.resume(found, files)? {
            if found.damaged.is_empty() && self.number == found.last {
                return self.journal.go_on(found);
            }
            // The index has all of it; folding replaces what is damaged.
            let damaged = found.damaged.join(" and ");
            let what = if damaged.is_empty() { "the journal has lost its end" } else { &damaged };
            self.repairs.push(Repair(format!("{what}; the database has it all, and nothing is lost")));
            self.journal.close();
        } else {
            self.rebuild(found, files)?;
            self.journal.close(); // damaged, or of another run of the system
        }
        Ok(())
    }

    /// Opens the index and gives it the writes that it lacks. Returns whether that was possible.
    fn resume(&mut self, found: &Found, files: &dyn IndexFiles) -> Result<bool> {
        let opened = files.open().and_then(|mut index| {
            let number = index.number()?;
            if number == 0 && found.last > 0 || number < found.base_number || found.missing_after(number) > 0 {
                return Ok(None);
            }
            for (number, batch) in found.batches_after(number) {
                index.apply(&batch, Some(number))?;
            }
            Ok(Some((index, number.max(found.last))))
        });
        match opened {
            Ok(Some((index, number))) => {
                (self.index, self.number) = (Some(index), number);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(Error::Database { path, reason }) if is_damage(&reason) => {
                let path = path.display();
                self.repairs.push(Repair(format!("the database in {path} was damaged ({reason}) and is made again")));
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Makes the index from base and journal. Where they are damaged, what can still be read of the old index is taken too.
    /// Returns whether they are whole; if not, the next write has to begin a new base.
    fn rebuild(&mut self, found: &Found, files: &dyn IndexFiles) -> Result<bool> {
        self.index = None;
        let missing = found.missing_after(found.base_number);
        let whole = found.damaged.is_empty() && missing == 0;
        let old = if whole { Vec::new() } else { self.salvage(files) };
        if whole {
            files.remove()?;
        } else {
            let aside =
                files.set_aside()?.map_or(String::new(), |path| format!(", the old one moved to {}", path.display()));
            self.repairs.push(Repair(format!(
                "{}{missing} writes of the journal are missing; the database was made again from what is left and from {} \
                 entries of the old one{aside}",
                found.damaged.iter().map(|d| format!("{d}; ")).collect::<String>(),
                old.len()
            )));
        }
        let mut index = files.open()?;
        let mut batch = WriteBatch::default();
        for (key, value) in old {
            batch.put(key, value);
        }
        index.apply(&batch, None)?;
        for (_, batch) in found.batches() {
            index.apply(&batch, None)?;
        }
        // Last: an index without a number is incomplete.
        self.number = self.number.max(found.last);
        index.apply(&WriteBatch::default(), Some(self.number))?;
        self.index = Some(index);
        Ok(whole)
    }

    /// The entries of the index that can be read.
    fn salvage(&self, files: &dyn IndexFiles) -> Vec<Entry> {
        let mut entries = Vec::new();
        let Ok(index) = files.open() else { return entries };
        let mut from = Bound::Included(Vec::new());
        loop {
            match index.page(from.as_ref().map(Vec::as_slice), b"", PAGE) {
                Ok(page) => {
                    let Some((last, _)) = page.last() else { return entries };
                    from = Bound::Excluded(last.clone());
                    entries.extend(page);
                }
                Err(_) => match after_damage(&*index, &from) {
                    Some(next) => from = Bound::Included(next),
                    None => return entries,
                },
            }
        }
    }
}

/// The key from which an index can be read again, after a page that cannot be read: of the keys that share ever less of the
/// last readable one's beginning, the first that is found.
fn after_damage(index: &dyn Index, failed: &Bound<Vec<u8>>) -> Option<Vec<u8>> {
    let last = match failed {
        Bound::Excluded(key) | Bound::Included(key) if !key.is_empty() => key.clone(),
        _ => vec![0],
    };
    for len in (1..=last.len()).rev() {
        for byte in (last[len - 1]..u8::MAX).map(|byte| byte + 1) {
            let mut candidate = last[..len].to_vec();
            candidate[len - 1] = byte;
            match index.page(Bound::Included(&candidate), b"", 1) {
                Ok(page) if page.is_empty() => return None,
                Ok(_) => return Some(candidate),
                Err(_) => {}
            }
        }
    }
    None
}

/// Whether a database failed because of what is in its files, and not because the system refused it threads or memory.
fn is_damage(reason: &str) -> bool {
    !reason.contains("os error") && !reason.contains("Resource temporarily unavailable")
}

impl KeyValue for Durable {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.reading(|index| index.get(key))
    }

    fn apply(&mut self, batch: WriteBatch) -> Result<()> {
        self.tidy()?;
        let state = self.state.get_mut();
        let number = state.number + 1;
        state.journal.append(number, &batch)?;
        state.number = number;
        let written = state.index.as_mut().map(|index| index.apply(&batch, Some(number)));
        if !matches!(written, Some(Ok(()))) {
            // It is durable; the next read opens the index again, with it.
            state.index = None;
        }
        self.sentinel.write(number)
    }

    fn scan_from<'a>(&'a self, prefix: &[u8], from: Bound<&[u8]>) -> Result<Entries<'a>> {
        Ok(Box::new(Pages::new(self, prefix, from)))
    }

    fn repairs(&self) -> Vec<Repair> {
        std::mem::take(&mut self.state.borrow_mut().repairs)
    }

    /// Compares the index with base and journal, which holds them all in memory.
    fn verify(&self) -> Result<Vec<String>> {
        let found = self.state.borrow().journal.read_again()?.unwrap_or_default();
        let mut damaged = found.damaged.clone();
        let mut entries = std::collections::BTreeMap::new();
        for (key, value) in found.batches().flat_map(|(_, batch)| batch.0) {
            match value {
                Some(value) => entries.insert(key, value),
                None => entries.remove(&key),
            };
        }
        for entry in self.scan(b"")? {
            let (key, value) = entry?;
            if entries.remove(&key).is_none_or(|known| known != value) {
                damaged
                    .push(format!("{}: the journal does not hold it as the database does", crate::record::name(&key)));
            }
        }
        let missing = entries.into_keys();
        damaged.extend(missing.map(|key| format!("{}: it is missing in the database", crate::record::name(&key))));
        Ok(damaged)
    }
}

/// The entries of a prefix, read page by page.
struct Pages<'a> {
    map: &'a Durable,
    prefix: Vec<u8>,
    page: std::vec::IntoIter<Entry>,
    from: Option<Bound<Vec<u8>>>,
}

impl<'a> Pages<'a> {
    fn new(map: &'a Durable, prefix: &[u8], from: Bound<&[u8]>) -> Self {
        let from = Some(from.map(<[u8]>::to_vec));
        Self { map, prefix: prefix.to_vec(), page: Vec::new().into_iter(), from }
    }
}

impl Iterator for Pages<'_> {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.page.next() {
                return Some(Ok(entry));
            }
            let from = self.from.take()?;
            let bound = from.as_ref().map(Vec::as_slice);
            match self.map.reading(|index| index.page(bound, &self.prefix, PAGE)) {
                Ok(page) => {
                    let (last, _) = page.last()?;
                    self.from = Some(Bound::Excluded(last.clone()));
                    self.page = page.into_iter();
                }
                Err(e) => return Some(Err(e)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::sled_kv::SledFiles;
    use crate::{Disk, MemoryKv};

    fn open_at(directory: &Path, boot: u8) -> Durable {
        Durable::open(directory, Arc::new(Disk), Box::new(SledFiles::new(directory)), [boot; 16]).unwrap()
    }

    fn open(directory: &Path) -> Durable {
        open_at(directory, 1)
    }

    /// Everything in a map, in order.
    fn all(kv: &dyn KeyValue) -> Vec<Entry> {
        kv.scan(b"").unwrap().collect::<Result<_>>().unwrap()
    }

    fn numbered(directory: &Path, n: u32) -> Durable {
        let mut kv = open(directory);
        for i in 0..n {
            let mut batch = WriteBatch::default();
            batch.put(i.to_be_bytes().to_vec(), vec![i as u8; 700]);
            kv.apply(batch).unwrap();
        }
        kv
    }

    #[test]
    fn it_agrees_with_a_map_across_reopening_folding_and_rebuilding() {
        let directory = tempfile::tempdir().unwrap();
        let mut model = MemoryKv::default();
        let mut state = 12345u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        let mut kv = open(directory.path());
        for round in 0..160 {
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
            match random(16) {
                0 => {
                    drop(kv);
                    kv = open(directory.path());
                }
                1 => {
                    drop(kv);
                    kv = open_at(directory.path(), random(3) as u8);
                }
                2 => kv.fold().unwrap(),
                3 => kv.rebuild().unwrap(),
                4 => kv.state.get_mut().index = None,
                _ => {}
            }
        }
        assert!(!all(&model).is_empty());
        assert_eq!(all(&kv), all(&model));
        for prefix in [b"a".as_slice(), b"a/", b"ab/", b"c"] {
            let of = |kv: &dyn KeyValue| kv.scan(prefix).unwrap().collect::<Result<Vec<_>>>().unwrap();
            assert_eq!(of(&kv), of(&model));
        }
        assert_eq!(kv.get(b"a/1").unwrap(), model.get(b"a/1").unwrap());
        assert_eq!((kv.verify().unwrap(), kv.repairs()), (vec![], vec![]));
    }

    /// Twenty entries in a map that has been closed.
    fn closed(directory: &Path) -> Vec<Entry> {
        all(&numbered(directory, 20))
    }

    #[test]
    fn a_lost_database_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let content = closed(directory.path());
        fs::remove_dir_all(directory.path().join("store")).unwrap();
        assert_eq!(all(&open(directory.path())), content);
    }

    #[test]
    fn a_directory_without_a_journal_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let content = closed(directory.path());
        // An older build wrote the number of the last write alone.
        fs::write(directory.path().join("store.sentinel"), 20u64.to_be_bytes()).unwrap();
        for name in ["store.base", "store.journal"] {
            fs::remove_file(directory.path().join(name)).unwrap();
        }
        let kv = open(directory.path());
        assert_eq!((all(&kv), kv.repairs()), (content.clone(), vec![]));
        drop(kv);
        fs::remove_dir_all(directory.path().join("store")).unwrap();
        assert_eq!(all(&open(directory.path())), content);
    }

    #[test]
    fn a_half_written_frame_is_cut_off_and_told_if_it_was_acknowledged() {
        let directory = tempfile::tempdir().unwrap();
        drop(numbered(directory.path(), 20));
        let journal = directory.path().join("store.journal");
        let whole = fs::read(&journal).unwrap();
        // A write that was not acknowledged.
        fs::write(&journal, [whole.as_slice(), &whole[40..200]].concat()).unwrap();
        let kv = open(directory.path());
        assert_eq!((all(&kv).len(), kv.repairs()), (20, vec![]));
        drop(kv);
        assert_eq!(fs::read(&journal).unwrap(), whole);
        // Half of one that was, of which the database has lost its copy too.
        fs::write(&journal, &whole[..whole.len() - 100]).unwrap();
        fs::remove_dir_all(directory.path().join("store")).unwrap();
        let mut kv = open(directory.path());
        assert_eq!(all(&kv).len(), 19);
        let repairs = kv.repairs();
        assert!(repairs[0].0.contains("stands at write 19 and 20 were acknowledged"), "{repairs:?}");
        kv.apply(WriteBatch::default()).unwrap();
        drop(kv);
        assert_eq!(open(directory.path()).repairs(), []);
    }

    #[test]
    fn the_size_of_all_files_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let mut kv = open(directory.path());
        let (mut random, mut largest) = (1u32, 0);
        for round in 0..400u32 {
            let mut batch = WriteBatch::default();
            for key in 0..100u32 {
                // Values that do not repeat, so that nothing is saved by writing them twice.
                random = random.wrapping_mul(747_796_405).wrapping_add(round);
                batch.put(key.to_be_bytes().to_vec(), random.to_be_bytes().repeat(1200));
            }
            kv.apply(batch).unwrap();
            let files =
                ["store.base", "store.journal"].map(|name| fs::metadata(directory.path().join(name)).unwrap().len());
            largest = largest.max(files.iter().sum::<u64>() + kv.index_files.size().unwrap());
        }
        // 192 MB were written, half a megabyte of which is live.
        assert!(largest < 130 << 20, "{largest}");
        assert_eq!(all(&kv).len(), 100);
        assert_eq!(kv.verify().unwrap(), Vec::<String>::new());
    }
}
