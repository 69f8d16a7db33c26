//! Replies of judges and people, kept in the job's store.

use rehearsal_actors::{ArchivistHandle, RewardError};
use rehearsal_store::{CachedReply, Usage};

use crate::judge::ReplyCache;

/// A judge's memory in the job's store. A reward runs on a thread of its own, so it may block on the archivist.
pub struct StoreMemory {
    archivist: ArchivistHandle,
    runtime: tokio::runtime::Handle,
}

impl StoreMemory {
    /// The memory of the job whose archivist this is. Must be called within a tokio runtime.
    pub fn new(archivist: ArchivistHandle) -> Self {
        Self { archivist, runtime: tokio::runtime::Handle::current() }
    }
}

impl ReplyCache for StoreMemory {
    fn recall(&self, keys: &[String]) -> Result<Vec<Option<CachedReply>>, RewardError> {
        self.runtime.block_on(self.archivist.cached_replies(keys.to_vec())).map_err(failed)
    }

    fn remember(&self, entries: Vec<(String, CachedReply)>, spent: Usage) -> Result<(), RewardError> {
        self.runtime.block_on(self.archivist.cache_replies(entries, spent)).map_err(failed)
    }

    fn spent(&self) -> Result<Usage, RewardError> {
        self.runtime.block_on(self.archivist.spent()).map_err(failed)
    }
}

fn failed(e: rehearsal_actors::Error) -> RewardError {
    RewardError::Failed { name: "the judge's memory".into(), row: 0, reason: e.to_string() }
}
