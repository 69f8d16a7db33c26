//! Weights as shards, named by the hash of their bytes.

use std::collections::BTreeMap;

use axum::body::Bytes;
use rehearsal_actors::ModelSnapshot;

use super::protocol::{Manifest, Shard};
use crate::error::Result;

/// Weights that nodes may fetch.
pub struct Weights {
    pub manifest: Manifest,
    shards: BTreeMap<String, Bytes>,
}

impl Weights {
    /// Those of a snapshot, whose bytes are copied.
    pub fn new(snapshot: &ModelSnapshot) -> Result<Self> {
        let (mut shards, mut all) = (BTreeMap::new(), Vec::new());
        for (tensor, bytes) in snapshot.parts()? {
            let hash = blake3::hash(&bytes).to_hex().to_string();
            all.push(Shard { tensor, hash: hash.clone(), len: bytes.len() as u64 });
            shards.insert(hash, Bytes::from(bytes));
        }
        Ok(Self { manifest: Manifest { version: snapshot.version, shards: all }, shards })
    }

    /// The bytes of a shard.
    pub fn shard(&self, hash: &str) -> Option<Bytes> {
        self.shards.get(hash).cloned()
    }
}
