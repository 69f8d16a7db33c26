//! A simulated computer: files that lose what was not synced, and an index that loses its newest writes.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::files::{Append, Files, Slot};
use crate::index::{Index, IndexFiles};
use crate::kv::{Entry, WriteBatch};
use crate::{Error, Result};

/// A generator of numbers, so that a run is repeated by its seed.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}

/// What goes wrong at an operation on files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The process is killed: what it has written stays.
    Kill,
    /// The power fails: what was not synced is lost, or torn, or there.
    Power,
    /// The operation fails, half done, with this error of the system.
    Refuse(i32),
    /// A bit of what is read is flipped.
    Flip,
}

type Inode = usize;

#[derive(Clone, Default)]
struct Content {
    now: Vec<u8>,
    synced: Vec<u8>,
}

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// The index as it was after some of its writes: the last one is what it holds.
type History = Vec<(Map, u64)>;

struct State {
    random: Random,
    inodes: Vec<Content>,
    names: BTreeMap<PathBuf, Inode>,
    /// Names as of the last sync of their directory.
    synced_names: BTreeMap<PathBuf, Inode>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    dead: Option<Fault>,
    boots: u8,
    index: History,
}

/// The computer; clones are the same one.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

/// Cut short by a kill or a power loss.
fn died() -> io::Error {
    io::Error::other("the process was killed")
}

impl World {
    pub fn new(seed: u64) -> Self {
        let state = State {
            random: Random(seed),
            inodes: Vec::new(),
            names: BTreeMap::new(),
            synced_names: BTreeMap::new(),
            operations: 0,
            fault: None,
            dead: None,
            boots: 1,
            index: vec![Default::default()],
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations on files so far.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// What goes wrong at the operation of a number.
    pub fn inject(&self, operation: u64, fault: Fault) {
        self.state().fault = Some((operation, fault));
    }

    /// Nothing goes wrong any more.
    pub fn calm(&self) {
        self.state().fault = None;
    }

    /// Creates or replaces a file, whose content is not synced.
    fn put(&self, path: &Path, bytes: &[u8]) -> io::Result<Inode> {
        let state = &mut *self.state();
        let fault = state.begin()?;
        let inode = state.create(path);
        let (len, error) = state.cut(fault, bytes.len());
        state.inodes[inode].now = bytes[..len].to_vec();
        error.map_or(Ok(inode), Err)
    }

    /// Opens a file, which is created unless it exists.
    fn open(&self, path: &Path) -> io::Result<OpenFile> {
        let state = &mut *self.state();
        if state.dead.is_some() {
            return Err(died());
        }
        let inode = state.inode(path).unwrap_or_else(|_| state.create(path));
        Ok(OpenFile { world: self.clone(), inode })
    }

    pub fn is_dead(&self) -> bool {
        self.state().dead.is_some()
    }

    pub fn boot(&self) -> [u8; 16] {
        [self.state().boots; 16]
    }

    /// Starts the process again after a kill, or the computer after a power loss.
    pub fn restart(&self) {
        let state = &mut *self.state();
        match state.dead.take() {
            Some(Fault::Power) => {
                state.boots += 1;
                state.lose_unsynced();
                // The index syncs nothing: anything may be left of it.
                let n = state.random.below(state.index.len() as u64) as usize;
                let (mut map, number) = state.index[n].clone();
                if state.random.below(2) == 0 {
                    map.retain(|key, value| {
                        (key.iter().map(|b| u64::from(*b)).sum::<u64>() + value.len() as u64).is_multiple_of(2)
                    });
                }
                state.index = vec![(map, number)];
            }
            // What the index had not yet written is lost: its newest writes.
            _ => {
                let n = 1 + state.random.below(state.index.len() as u64) as usize;
                state.index.truncate(n);
            }
        }
    }
}

impl State {
    fn lose_unsynced(&mut self) {
        for content in &mut self.inodes {
            if content.now != content.synced {
                content.now = match self.random.below(3) {
                    0 => content.synced.clone(),
                    1 => content.now.clone(),
                    _ => {
                        // Some of what was appended, and zeros where blocks were not written.
                        let synced = content.synced.len().min(content.now.len());
                        let mut torn = content.now.clone();
                        torn.truncate(synced + self.random.below((torn.len() - synced) as u64 + 1) as usize);
                        let kept = synced + self.random.below((torn.len() - synced) as u64 + 1) as usize;
                        torn[kept..].fill(0);
                        torn
                    }
                };
                content.synced = content.now.clone();
            }
        }
        // Of the changes to a directory any may have reached the disk.
        let paths: Vec<PathBuf> = self.names.keys().chain(self.synced_names.keys()).cloned().collect();
        for path in paths {
            if self.random.below(2) == 0 {
                match self.synced_names.get(&path) {
                    Some(inode) => self.names.insert(path, *inode),
                    None => self.names.remove(&path),
                };
            }
        }
        self.synced_names = self.names.clone();
    }

    /// Begins an operation; the fault that happens in it, if one does.
    fn begin(&mut self) -> io::Result<Option<Fault>> {
        if self.dead.is_some() {
            return Err(died());
        }
        self.operations += 1;
        match self.fault {
            Some((at, fault)) if at == self.operations => {
                self.fault = None;
                if matches!(fault, Fault::Kill | Fault::Power) {
                    self.dead = Some(fault);
                }
                Ok(Some(fault))
            }
            _ => Ok(None),
        }
    }

    /// How an operation that writes `len` bytes ends: how many of them are written, and how it fails.
    fn cut(&mut self, fault: Option<Fault>, len: usize) -> (usize, Option<io::Error>) {
        match fault {
            None | Some(Fault::Flip) => (len, None),
            Some(Fault::Refuse(code)) => {
                (self.random.below(len as u64 + 1) as usize, Some(io::Error::from_raw_os_error(code)))
            }
            Some(Fault::Kill | Fault::Power) => (self.random.below(len as u64 + 1) as usize, Some(died())),
        }
    }

    fn inode(&self, path: &Path) -> io::Result<Inode> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create(&mut self, path: &Path) -> Inode {
        self.inodes.push(Content::default());
        self.names.insert(path.into(), self.inodes.len() - 1);
        self.inodes.len() - 1
    }
}

impl Files for World {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = &mut *self.state();
        let fault = state.begin()?;
        let mut bytes = state.inodes[state.inode(path)?].now.clone();
        match fault {
            Some(Fault::Flip) if !bytes.is_empty() => {
                let at = state.random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << state.random.below(8);
            }
            Some(Fault::Refuse(code)) => return Err(io::Error::from_raw_os_error(code)),
            Some(Fault::Kill | Fault::Power) => return Err(died()),
            _ => {}
        }
        Ok(bytes)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let inode = self.put(path, bytes)?;
        self.state().inodes[inode].synced = bytes.to_vec();
        Ok(())
    }

    fn write_lazily(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.put(path, bytes).map(|_| ())
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn Append>> {
        Ok(Box::new(self.open(path)?))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Append>> {
        let inode = self.put(path, b"")?;
        Ok(Box::new(OpenFile { world: self.clone(), inode }))
    }

    fn slot(&self, path: &Path) -> io::Result<Box<dyn Slot>> {
        Ok(Box::new(self.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let state = &mut *self.state();
        let fault = state.begin()?;
        let (done, error) = state.cut(fault, 1);
        if done == 1 {
            let inode = state.inode(from)?;
            state.names.remove(from);
            state.names.insert(to.into(), inode);
        }
        error.map_or(Ok(()), Err)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let state = &mut *self.state();
        let fault = state.begin()?;
        let (done, error) = state.cut(fault, 1);
        if done == 1 {
            state.inode(path)?;
            state.names.remove(path);
        }
        error.map_or(Ok(()), Err)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        let state = &mut *self.state();
        let fault = state.begin()?;
        let (done, error) = state.cut(fault, 1);
        if done == 1 {
            let inside = |name: &Path| name.parent() == Some(path);
            state.synced_names.retain(|name, _| !inside(name));
            let names = state.names.iter().filter(|(name, _)| inside(name)).map(|(name, inode)| (name.clone(), *inode));
            state.synced_names.extend(names.collect::<Vec<_>>());
        }
        error.map_or(Ok(()), Err)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.state();
        if state.dead.is_some() {
            return Err(died());
        }
        let inside = state.names.keys().filter(|name| name.parent() == Some(path));
        Ok(inside.filter_map(|name| Some(name.file_name()?.to_str()?.to_string())).collect())
    }

    fn create_directory(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

struct OpenFile {
    world: World,
    inode: Inode,
}

impl Append for OpenFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.world.state();
        let fault = state.begin()?;
        let (len, error) = state.cut(fault, bytes.len());
        state.inodes[self.inode].now.extend_from_slice(&bytes[..len]);
        error.map_or(Ok(()), Err)
    }

    fn sync(&mut self) -> io::Result<()> {
        let state = &mut *self.world.state();
        let fault = state.begin()?;
        let (done, error) = state.cut(fault, 1);
        let content = &mut state.inodes[self.inode];
        if done == 1 {
            content.synced = content.now.clone();
        }
        error.map_or(Ok(()), Err)
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        let state = &mut *self.world.state();
        let fault = state.begin()?;
        let (done, error) = state.cut(fault, 1);
        let content = &mut state.inodes[self.inode];
        if done == 1 {
            content.now.truncate(len as usize);
        }
        if let Some(error) = error {
            return Err(error);
        }
        content.synced = content.now.clone();
        Ok(())
    }
}

impl Slot for OpenFile {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.world.state();
        match state.begin()? {
            Some(Fault::Refuse(code)) => return Err(io::Error::from_raw_os_error(code)),
            Some(Fault::Kill | Fault::Power) => return Err(died()),
            _ => {}
        }
        state.inodes[self.inode].now = bytes.to_vec();
        Ok(())
    }
}

/// The index of a world, which keeps what it held before its newest writes.
pub struct SimulatedIndex(pub World);

/// Writes that the index may lose when the process is killed.
const UNWRITTEN_MAX: usize = 4;

impl SimulatedIndex {
    fn dead(&self) -> Error {
        Error::Io { path: "index".into(), source: died() }
    }
}

impl Index for SimulatedIndex {
    fn number(&self) -> Result<u64> {
        Ok(self.0.state().index.last().map_or(0, |(_, number)| *number))
    }

    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        if self.0.is_dead() {
            return Err(self.dead());
        }
        Ok(self.0.state().index.last().and_then(|(map, _)| map.get(key).cloned()))
    }

    fn apply(&mut self, writes: &WriteBatch, number: Option<u64>) -> Result<()> {
        if self.0.is_dead() {
            return Err(self.dead());
        }
        let state = &mut *self.0.state();
        let (mut map, known) = state.index.last().cloned().unwrap_or_default();
        for (key, value) in &writes.0 {
            match value {
                Some(value) => map.insert(key.clone(), value.clone()),
                None => map.remove(key),
            };
        }
        state.index.push((map, number.unwrap_or(known)));
        if state.index.len() > UNWRITTEN_MAX {
            state.index.remove(0);
        }
        Ok(())
    }

    fn page(&self, from: Bound<&[u8]>, prefix: &[u8], len: usize) -> Result<Vec<Entry>> {
        if self.0.is_dead() {
            return Err(self.dead());
        }
        let state = self.0.state();
        let Some((map, _)) = state.index.last() else { return Ok(Vec::new()) };
        let entries = map.range::<[u8], _>((from, Bound::Unbounded)).take_while(|(key, _)| key.starts_with(prefix));
        Ok(entries.take(len).map(|(key, value)| (key.clone(), value.clone())).collect())
    }
}

impl IndexFiles for SimulatedIndex {
    fn open(&self) -> Result<Box<dyn Index>> {
        if self.0.is_dead() { Err(self.dead()) } else { Ok(Box::new(Self(self.0.clone()))) }
    }

    fn set_aside(&self) -> Result<Option<PathBuf>> {
        self.remove()?;
        Ok(None)
    }

    fn remove(&self) -> Result<()> {
        self.0.state().index = vec![Default::default()];
        Ok(())
    }

    fn size(&self) -> Result<u64> {
        Ok(0)
    }
}
