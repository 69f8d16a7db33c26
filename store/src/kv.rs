//! The little that is asked of a database, and a map that does it for tests.

use std::collections::BTreeMap;

use crate::Result;

/// A key with its value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// Changes that become visible and durable together.
#[derive(Debug, Default, Clone)]
pub struct Changes(pub(crate) Vec<(Vec<u8>, Option<Vec<u8>>)>);

impl Changes {
    /// Sets a key.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.0.push((key, Some(value)));
    }

    /// Removes a key.
    pub fn remove(&mut self, key: Vec<u8>) {
        self.0.push((key, None));
    }
}

/// An ordered map of bytes whose every applied change is durable.
pub trait KeyValue: Send {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// Applies all changes or none; on return they survive a power cut.
    fn apply(&mut self, changes: Changes) -> Result<()>;
    /// Entries whose key begins with `prefix`, in order.
    fn scan<'a>(&'a self, prefix: &[u8]) -> Result<Box<dyn Iterator<Item = Result<Entry>> + 'a>>;
}

/// A map in memory.
#[derive(Debug, Default)]
pub struct MemoryKv(BTreeMap<Vec<u8>, Vec<u8>>);

impl KeyValue for MemoryKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.get(key).cloned())
    }

    fn apply(&mut self, changes: Changes) -> Result<()> {
        for (key, value) in changes.0 {
            match value {
                Some(value) => self.0.insert(key, value),
                None => self.0.remove(&key),
            };
        }
        Ok(())
    }

    fn scan<'a>(&'a self, prefix: &[u8]) -> Result<Box<dyn Iterator<Item = Result<Entry>> + 'a>> {
        let prefix = prefix.to_vec();
        let from = self.0.range(prefix.clone()..);
        Ok(Box::new(from.take_while(move |(k, _)| k.starts_with(&prefix)).map(|(k, v)| Ok((k.clone(), v.clone())))))
    }
}
