//! What makes writes durable: a base, which holds every entry as of one write, and a journal of the batches since.
//!
//! The database is an index that can be made from the two at any time. Both are files of [frames](crate::frame) after a
//! header: `[magic: 8][number of the base's last write: 8][boot: 16][checksum: 8]`. The boot identifies the run of the
//! operating system in which the journal was begun: after another one, what the database has not synced may be lost.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::IoContext;
use crate::files::{Append, Files, beside, replace_durably};
use crate::frame::{self, Frames};
use crate::kv::{Entry, WriteBatch};
use crate::{Error, Result};

const BASE: &str = "store.base";
const JOURNAL: &str = "store.journal";
const MAGIC: [u8; 8] = *b"RhStore1";
const HEADER: usize = 40;
/// Bytes of entries in a frame of the base.
const FRAME_BYTES: usize = 1 << 20;
/// The journal is folded into the base when it is larger than this and than the base.
const FOLD_MIN_BYTES: u64 = 16 << 20;

pub struct Journal {
    files: Arc<dyn Files>,
    directory: PathBuf,
    boot: [u8; 16],
    /// `None` before the first write, and after an error that may have left garbage behind.
    file: Option<Box<dyn Append>>,
    len: u64,
    base_len: u64,
}

/// What the files hold.
#[derive(Default)]
pub struct Found {
    pub base: Vec<u8>,
    pub base_frames: Frames,
    pub journal: Vec<u8>,
    pub journal_frames: Frames,
    /// Number of the base's last write, and of the last write of all.
    pub base_number: u64,
    pub last: u64,
    /// Whether the system has run since the journal was begun.
    pub same_boot: bool,
    /// What is damaged.
    pub damaged: Vec<String>,
}

impl Found {
    /// The batches in order, each with its number.
    pub fn batches(&self) -> impl Iterator<Item = (u64, WriteBatch)> {
        let base = self.base_frames.intact.iter().filter_map(|f| Some((f.number, f.batch(&self.base)?)));
        base.chain(self.batches_after(self.base_number))
    }

    /// The batches of the journal after a write, in order, each with its number.
    pub fn batches_after(&self, number: u64) -> impl Iterator<Item = (u64, WriteBatch)> {
        let frames = self.journal_frames.intact.iter().filter(move |f| f.number > number);
        frames.filter_map(|f| Some((f.number, f.batch(&self.journal)?)))
    }

    /// How many of the writes after `number` are missing.
    pub fn missing_after(&self, number: u64) -> u64 {
        let there = self.journal_frames.intact.iter().filter(|f| f.number > number).count() as u64;
        self.last.saturating_sub(number).saturating_sub(there)
    }
}

impl Journal {
    pub fn new(directory: &Path, files: Arc<dyn Files>, boot: [u8; 16]) -> Self {
        Self { files, directory: directory.into(), boot, file: None, len: 0, base_len: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn content(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        match self.files.read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).at(&path),
        }
    }

    /// Reads the files, to go on with them; `None` where there are none, as in a new directory.
    pub fn read(&mut self) -> Result<Option<Found>> {
        let found = self.read_again()?;
        if let Some(found) = &found {
            (self.base_len, self.len) = (found.base.len() as u64, found.journal.len() as u64);
        }
        Ok(found)
    }

    /// Reads the files.
    pub fn read_again(&self) -> Result<Option<Found>> {
        let (base, journal) = (self.content(BASE)?, self.content(JOURNAL)?);
        if base.is_none() && journal.is_none() {
            return Ok(None);
        }
        let mut found = Found::default();
        let mut header = |name: &str, bytes: &Option<Vec<u8>>| {
            let header = bytes.as_ref().and_then(|b| read_header(b));
            if header.is_none() {
                let what = if bytes.is_none() { "is missing" } else { "has a damaged header" };
                found.damaged.push(format!("{} {what}", self.path(name).display()));
            }
            header
        };
        let (of_base, of_journal) = (header(BASE, &base), header(JOURNAL, &journal));
        (found.base, found.journal) = (base.unwrap_or_default(), journal.unwrap_or_default());
        found.base_frames = Frames::read(&found.base, found.base.len().min(HEADER));
        found.journal_frames = Frames::read(&found.journal, found.journal.len().min(HEADER));
        let complete =
            found.base_frames.intact.last().is_some_and(|f| f.batch(&found.base).is_some_and(|b| b.0.is_empty()));
        if !complete || !found.base_frames.damaged.is_empty() {
            found.damaged.push(format!("{} is damaged", self.path(BASE).display()));
        }
        if !found.journal_frames.damaged.is_empty() {
            found.damaged.push(format!("{} is damaged", self.path(JOURNAL).display()));
        }
        let first = found.journal_frames.intact.first().map(|f| f.number - 1);
        found.base_number = of_base.or(of_journal).map(|(number, _)| number).or(first).unwrap_or(0);
        found.same_boot = of_journal.is_some_and(|(_, boot)| boot == self.boot && boot != [0; 16]);
        let last = found.journal_frames.intact.last().map_or(0, |f| f.number);
        found.last = last.max(found.base_number);
        Ok(Some(found))
    }

    /// Goes on with the journal that [`Journal::read`] has read, without what a killed process left half-written. What was
    /// read is durable from now on: the process may have been killed before its sync.
    pub fn go_on(&mut self, found: &Found) -> Result<()> {
        let path = self.path(JOURNAL);
        let end = found.journal_frames.end as u64;
        let mut file = self.files.append(&path).at(&path)?;
        if end < self.len {
            file.truncate(end).at(&path)?;
        }
        file.sync().at(&path)?;
        self.files.sync_directory(&self.directory).at(&self.directory)?;
        (self.file, self.len) = (Some(file), end);
        Ok(())
    }

    /// Appends nothing more: the next write begins a new base.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Whether writes have to be folded before the next one can be appended.
    pub fn must_fold(&self) -> bool {
        self.file.is_none()
    }

    /// Whether the journal has grown so large that it should be folded.
    pub fn is_long(&self) -> bool {
        self.len > FOLD_MIN_BYTES.max(self.base_len)
    }

    /// Bytes of the base: of all entries when it was written.
    pub fn base_len(&self) -> u64 {
        self.base_len
    }

    /// Appends a batch durably. An error leaves the journal as it was.
    pub fn append(&mut self, number: u64, batch: &WriteBatch) -> Result<()> {
        let path = self.path(JOURNAL);
        let bytes = frame::encode(number, batch)?;
        let closed = || Error::Database { path: path.clone(), reason: "the journal is not open".into() };
        let file = self.file.as_mut().ok_or_else(closed)?;
        if let Err(e) = file.append(&bytes).and_then(|()| file.sync()) {
            // What cannot be taken back is left behind with the file.
            if file.truncate(self.len).is_err() {
                self.file = None;
            }
            return Err(e).at(&path);
        }
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Begins a new base, of all entries as of write `number`.
    pub fn begin_base(&self, number: u64) -> Result<NewBase> {
        let path = beside(&self.path(BASE));
        let mut base = NewBase {
            file: self.files.create(&path).at(&path)?,
            path,
            number,
            batch: WriteBatch::default(),
            bytes: 0,
            len: 0,
        };
        base.write(&header(number, self.boot))?;
        Ok(base)
    }

    /// Puts a new base, which has all entries, in the place of the old one, and begins an empty journal.
    pub fn put_base(&mut self, new: NewBase) -> Result<()> {
        self.file = None;
        let (base, journal) = (self.path(BASE), self.path(JOURNAL));
        self.files.rename(&new.path, &base).at(&base)?;
        self.files.sync_directory(&self.directory).at(&self.directory)?;
        let header = header(new.number, self.boot);
        replace_durably(&*self.files, &journal, &header).at(&journal)?;
        self.file = Some(self.files.append(&journal).at(&journal)?);
        (self.base_len, self.len) = (new.len, header.len() as u64);
        Ok(())
    }

    /// Gives up a new base, and frees its space.
    pub fn drop_base(&self, new: NewBase) {
        let path = new.path.clone();
        drop(new);
        let _ = self.files.remove(&path); // the next one replaces it
    }
}

/// A base that is being written, beside the one that is in use.
pub struct NewBase {
    file: Box<dyn Append>,
    path: PathBuf,
    number: u64,
    /// Entries of the next frame, and the bytes of their keys and values.
    batch: WriteBatch,
    bytes: usize,
    /// Bytes written.
    len: u64,
}

impl NewBase {
    /// Adds an entry.
    pub fn push(&mut self, (key, value): Entry) -> Result<()> {
        self.bytes += key.len() + value.len();
        self.batch.put(key, value);
        if self.bytes >= FRAME_BYTES { self.end_frame() } else { Ok(()) }
    }

    /// Makes it durable; nothing can be added any more.
    pub fn end(&mut self) -> Result<()> {
        if !self.batch.0.is_empty() {
            self.end_frame()?;
        }
        self.end_frame()?; // an empty batch ends the base
        self.file.sync().at(&self.path)
    }

    fn end_frame(&mut self) -> Result<()> {
        let frame = frame::encode(self.number, &std::mem::take(&mut self.batch))?;
        self.bytes = 0;
        self.write(&frame)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.len += bytes.len() as u64;
        self.file.append(bytes).at(&self.path)
    }
}

fn header(number: u64, boot: [u8; 16]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..16].copy_from_slice(&number.to_be_bytes());
    header[16..32].copy_from_slice(&boot);
    let sum = blake3::hash(&header[..32]);
    header[32..].copy_from_slice(&sum.as_bytes()[..8]);
    header
}

fn read_header(file: &[u8]) -> Option<(u64, [u8; 16])> {
    let header = file.get(..HEADER)?;
    let intact = header[..8] == MAGIC && header[32..] == blake3::hash(&header[..32]).as_bytes()[..8];
    let number = u64::from_be_bytes(header[8..16].try_into().ok()?);
    intact.then_some((number, header[16..32].try_into().ok()?))
}

/// Whether a directory has a base or a journal.
pub fn exists(directory: &Path) -> bool {
    [BASE, JOURNAL].iter().any(|name| directory.join(name).exists())
}

/// Identifies the run of the operating system; all zeros where it has no such identity, which equals none.
pub fn boot() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut id = [0; 16];
    let digits: Vec<u8> = text.bytes().filter_map(|b| (b as char).to_digit(16)).map(|d| d as u8).collect();
    if digits.len() == 32 {
        for (byte, pair) in id.iter_mut().zip(digits.chunks(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
    }
    id
}
