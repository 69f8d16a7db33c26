//! A disk in memory, mounted through FUSE, that loses at a power cut what was not synced: of files their unsynced pages, one by
//! one; of folders the changes of names, one by one. A rename survives whole or not at all, as on journaling file systems.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use super::Random;

const TTL: Duration = Duration::from_secs(1);
const PAGE: usize = 4096;

type Names = BTreeMap<(u64, OsString), u64>;

#[derive(Clone)]
struct Node {
    kind: FileType,
    perm: u16,
    modified: SystemTime,
    now: Vec<u8>,
    synced: Vec<u8>,
}

/// A change of names that is not yet synced.
#[derive(Clone)]
enum Change {
    Add(u64, OsString, u64),
    Remove(u64, OsString),
    Rename((u64, OsString), (u64, OsString)),
}

impl Change {
    /// The folder whose sync makes it last.
    fn folder(&self) -> u64 {
        match self {
            Self::Add(folder, ..) | Self::Remove(folder, _) | Self::Rename(_, (folder, _)) => *folder,
        }
    }

    fn apply(&self, names: &mut Names) {
        match self {
            Self::Add(folder, name, node) => {
                names.insert((*folder, name.clone()), *node);
            }
            Self::Remove(folder, name) => {
                names.remove(&(*folder, name.clone()));
            }
            Self::Rename(from, to) => {
                if let Some(node) = names.remove(from) {
                    names.insert(to.clone(), node);
                }
            }
        }
    }
}

struct State {
    /// By number; they are never given twice. 1 is the root.
    nodes: BTreeMap<u64, Node>,
    names: Names,
    synced: Names,
    pending: Vec<Change>,
    /// No power: every request fails.
    off: bool,
    /// Syncs take until this is over.
    stalled: bool,
}

/// The disk; clones are the same one.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn new() -> Self {
        let root = Node::new(FileType::Directory, 0o755);
        let nodes = BTreeMap::from([(1, root)]);
        let state =
            State { nodes, names: Names::new(), synced: Names::new(), pending: Vec::new(), off: false, stalled: false };
        Self(Arc::new(Mutex::new(state)))
    }

    pub fn mount(&self, path: &Path) -> std::io::Result<BackgroundSession> {
        fuser::spawn_mount(self.clone(), path, &Config::default())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power: from now on all requests fail.
    pub fn cut(&self) {
        self.state().off = true;
    }

    /// Makes syncs wait, or lets them go on.
    pub fn stall(&self, stalled: bool) {
        self.state().stalled = stalled;
    }

    /// What is on the disk when the power is back.
    pub fn survived(&self, random: &mut Random) -> Self {
        let state = self.state();
        let mut names = state.synced.clone();
        for change in &state.pending {
            if random.below(2) == 0 {
                change.apply(&mut names);
            }
        }
        let mut nodes = state.nodes.clone();
        for node in nodes.values_mut() {
            node.lose(random);
        }
        let state = State { nodes, synced: names.clone(), names, pending: Vec::new(), off: false, stalled: false };
        Self(Arc::new(Mutex::new(state)))
    }
}

impl Node {
    fn new(kind: FileType, perm: u16) -> Self {
        Self { kind, perm, modified: SystemTime::now(), now: Vec::new(), synced: Vec::new() }
    }

    /// Keeps what was synced, what was written, or a page of either each.
    fn lose(&mut self, random: &mut Random) {
        match random.below(3) {
            0 => self.now = self.synced.clone(),
            1 => {}
            _ => {
                let len = [self.now.len(), self.synced.len()][random.below(2)];
                let mut mixed = vec![0; len];
                for start in (0..len).step_by(PAGE) {
                    let from = [&self.now, &self.synced][random.below(2)];
                    let end = (start + PAGE).min(len).min(from.len());
                    if start < end {
                        mixed[start..end].copy_from_slice(&from[start..end]);
                    }
                }
                self.now = mixed;
            }
        }
        self.synced = self.now.clone();
    }

    fn attributes(&self, number: u64) -> FileAttr {
        let size = self.now.len() as u64;
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: self.modified,
            mtime: self.modified,
            ctime: self.modified,
            crtime: self.modified,
            kind: self.kind,
            perm: self.perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: PAGE as u32,
            flags: 0,
        }
    }
}

impl State {
    fn on(&self) -> Result<(), Errno> {
        if self.off { Err(Errno::EIO) } else { Ok(()) }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<u64, Errno> {
        self.on()?;
        self.names.get(&(parent.0, name.into())).copied().ok_or(Errno::ENOENT)
    }

    fn node(&mut self, number: INodeNo) -> Result<&mut Node, Errno> {
        self.on()?;
        self.nodes.get_mut(&number.0).ok_or(Errno::ENOENT)
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.names);
        self.pending.push(change);
    }

    fn make(&mut self, parent: INodeNo, name: &OsStr, kind: FileType, mode: u32) -> Result<FileAttr, Errno> {
        self.on()?;
        if self.names.contains_key(&(parent.0, name.into())) {
            return Err(Errno::EEXIST);
        }
        let number = 1 + self.nodes.last_key_value().map_or(0, |(number, _)| *number);
        let node = Node::new(kind, (mode & 0o777) as u16);
        let attributes = node.attributes(number);
        self.nodes.insert(number, node);
        self.change(Change::Add(parent.0, name.into(), number));
        Ok(attributes)
    }

    fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let number = self.find(parent, name)?;
        if self.names.keys().any(|(folder, _)| *folder == number) {
            return Err(Errno::ENOTEMPTY);
        }
        self.change(Change::Remove(parent.0, name.into()));
        Ok(())
    }

    fn sync_folder(&mut self, folder: INodeNo) -> Result<(), Errno> {
        self.on()?;
        let (done, left) = std::mem::take(&mut self.pending).into_iter().partition(|c| c.folder() == folder.0);
        let done: Vec<Change> = done;
        done.iter().for_each(|change| change.apply(&mut self.synced));
        self.pending = left;
        Ok(())
    }
}

/// Answers a request that returns nothing.
fn answer(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

fn entry(reply: ReplyEntry, result: Result<FileAttr, Errno>) {
    match result {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        let found = state.find(parent, name).and_then(|n| Ok(state.node(INodeNo(n))?.attributes(n)));
        entry(reply, found);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.state().node(number) {
            Ok(node) => reply.attr(&TTL, &node.attributes(number.0)),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.state().node(number) {
            Ok(node) => {
                node.perm = mode.map_or(node.perm, |mode| (mode & 0o777) as u16);
                if let Some(size) = size {
                    node.now.resize(size as usize, 0);
                    node.modified = SystemTime::now();
                }
                reply.attr(&TTL, &node.attributes(number.0));
            }
            Err(e) => reply.error(e),
        }
    }

    fn mknod(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: u32, reply: ReplyEntry) {
        let kind = if mode & libc::S_IFMT == libc::S_IFSOCK { FileType::Socket } else { FileType::RegularFile };
        entry(reply, self.state().make(parent, name, kind, mode));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        entry(reply, self.state().make(parent, name, FileType::Directory, mode));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.state().remove(parent, name));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(reply, self.state().remove(parent, name));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        let moved = state.find(parent, name).map(|_| {
            state.change(Change::Rename((parent.0, name.into()), (new_parent.0, new_name.into())));
        });
        answer(reply, moved);
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: i32, reply: ReplyCreate) {
        match self.state().make(parent, name, FileType::RegularFile, mode) {
            Ok(attributes) => reply.created(&TTL, &attributes, Generation(0), FileHandle(0), FopenFlags::empty()),
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.state().node(number) {
            Ok(node) => {
                let start = (offset as usize).min(node.now.len());
                let end = (start + size as usize).min(node.now.len());
                reply.data(&node.now[start..end]);
            }
            Err(e) => reply.error(e),
        }
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.state().node(number) {
            Ok(node) => {
                let end = offset as usize + data.len();
                if node.now.len() < end {
                    node.now.resize(end, 0);
                }
                node.now[offset as usize..end].copy_from_slice(data);
                node.modified = SystemTime::now();
                reply.written(data.len() as u32);
            }
            Err(e) => reply.error(e),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        while self.state().stalled {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut state = self.state();
        answer(reply, state.node(number).map(|node| node.synced = node.now.clone()));
    }

    fn fsyncdir(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer(reply, self.state().sync_folder(number));
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let state = self.state();
        if let Err(e) = state.on() {
            return reply.error(e);
        }
        let inside = state.names.iter().filter(|((folder, _), _)| *folder == number.0);
        for (i, ((_, name), node)) in inside.enumerate().skip(offset as usize) {
            let kind = state.nodes.get(node).map_or(FileType::RegularFile, |node| node.kind);
            if reply.add(INodeNo(*node), i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        const BLOCKS: u64 = 1 << 20;
        reply.statfs(BLOCKS, BLOCKS, BLOCKS, 1 << 20, 1 << 20, PAGE as u32, 255, PAGE as u32);
    }
}
