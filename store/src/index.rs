//! The database beneath the journal: an index from which entries are read, which can be made again at any time.

use std::ops::Bound;
use std::path::PathBuf;

use crate::Result;
use crate::kv::{Entry, WriteBatch};

/// An open index.
pub trait Index: Send {
    /// Number of the last write that it has; 0 if it has none, or is incomplete.
    fn number(&self) -> Result<u64>;
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// Applies all writes or none, and sets the number.
    fn apply(&mut self, writes: &WriteBatch, number: Option<u64>) -> Result<()>;
    /// At most `len` entries, from a key on, that begin with `prefix`, in the order of keys. A page that is shorter is the
    /// last one only if it is empty.
    fn page(&self, from: Bound<&[u8]>, prefix: &[u8], len: usize) -> Result<Vec<Entry>>;
}

/// Where an index is kept.
pub trait IndexFiles: Send {
    /// Opens or creates it.
    fn open(&self) -> Result<Box<dyn Index>>;
    /// Moves it away for good, and returns where to; `None` if there is none.
    fn set_aside(&self) -> Result<Option<PathBuf>>;
    /// Deletes it.
    fn remove(&self) -> Result<()>;
    /// Bytes that its files take.
    fn size(&self) -> Result<u64>;
}
