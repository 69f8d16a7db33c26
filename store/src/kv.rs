//! The interface to the database, and an implementation in memory for tests.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::{Repair, Result};

/// A key with its value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// Entries in the order of keys.
pub type Entries<'a> = Box<dyn Iterator<Item = Result<Entry>> + 'a>;

/// Writes that become visible and durable together.
#[derive(Debug, Default, Clone)]
pub struct WriteBatch(pub(crate) Vec<(Vec<u8>, Option<Vec<u8>>)>);

impl WriteBatch {
    /// Sets a key.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.0.push((key, Some(value)));
    }

    /// Removes a key.
    pub fn remove(&mut self, key: Vec<u8>) {
        self.0.push((key, None));
    }
}

/// An ordered map from bytes to bytes with durable writes.
pub trait KeyValue: Send {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// Applies all writes or none. After `Ok` they survive a power loss.
    fn apply(&mut self, batch: WriteBatch) -> Result<()>;
    /// Checks what lies beneath the map, and returns a message for all that is damaged.
    fn verify(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
    /// What was repaired since the last call.
    fn repairs(&self) -> Vec<Repair> {
        Vec::new()
    }
    /// The entries whose keys begin with `prefix`, from a key on, in the order of keys.
    fn scan_from<'a>(&'a self, prefix: &[u8], from: Bound<&[u8]>) -> Result<Entries<'a>>;
    /// The entries whose keys begin with `prefix`, in the order of keys.
    fn scan<'a>(&'a self, prefix: &[u8]) -> Result<Entries<'a>> {
        self.scan_from(prefix, Bound::Included(prefix))
    }
}

/// A map in memory.
#[derive(Debug, Default)]
pub struct MemoryKv(BTreeMap<Vec<u8>, Vec<u8>>);

impl KeyValue for MemoryKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.get(key).cloned())
    }

    fn apply(&mut self, batch: WriteBatch) -> Result<()> {
        for (key, value) in batch.0 {
            match value {
                Some(value) => self.0.insert(key, value),
                None => self.0.remove(&key),
            };
        }
        Ok(())
    }

    fn scan_from<'a>(&'a self, prefix: &[u8], from: Bound<&[u8]>) -> Result<Entries<'a>> {
        let prefix = prefix.to_vec();
        let from = self.0.range::<[u8], _>((from, Bound::Unbounded));
        Ok(Box::new(from.take_while(move |(k, _)| k.starts_with(&prefix)).map(|(k, v)| Ok((k.clone(), v.clone())))))
    }
}
