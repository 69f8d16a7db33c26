//! The archivist: owns the store, and does its I/O on the role's own thread.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use candle_core::{Device, Tensor};
use rehearsal_store::{
    CachedReply, Error as StoreError, Keep, Preference, Repair, RolloutRecord, SavedCheckpoint, ScoreRecord, Store,
    TensorBytes, Usage,
};

use crate::role::{Build, Link, Permit, Reply, StateMachine, answer, local_message, role_status};
use crate::snapshot::{bytes, stored_dtype, stored_name};
use crate::{Error, ModelSnapshot, Restored, Result};

/// Time between attempts to write to a full disk.
const FULL_DISK_RETRY: Duration = Duration::from_secs(2);

/// A checkpoint to be saved: what a job needs to resume.
#[derive(Clone)]
pub struct JobCheckpoint {
    /// Number of steps done.
    pub step: u64,
    /// The trained models by role.
    pub models: BTreeMap<String, ModelSnapshot>,
    /// The job's own state; the store does not interpret it.
    pub state: Vec<u8>,
    /// Which checkpoints to keep, this one included.
    pub keep: Keep,
}

/// The logged rollouts and scores of a step that was interrupted, in the order of their indices.
#[derive(Debug, Default, Clone)]
pub struct Replay {
    /// Completions that were logged, by index.
    pub rollouts: Vec<RolloutRecord>,
    /// Scores that were logged, by index.
    pub scores: Vec<ScoreRecord>,
}

pub(crate) enum ArchivistMsg {
    Checkpoint {
        checkpoint: Box<JobCheckpoint>,
        _permit: Permit,
        reply: Reply<SavedCheckpoint>,
    },
    Restore {
        _permit: Permit,
        reply: Reply<(Option<Restored>, Vec<Repair>)>,
    },
    Replay {
        step: u64,
        _permit: Permit,
        reply: Reply<Replay>,
    },
    CachedReplies {
        keys: Vec<String>,
        _permit: Permit,
        reply: Reply<Vec<Option<CachedReply>>>,
    },
    CacheReplies {
        entries: Vec<(String, CachedReply)>,
        spent: Usage,
        _permit: Permit,
        reply: Reply<()>,
    },
    Spent {
        _permit: Permit,
        reply: Reply<Usage>,
    },
    Read {
        read: ReadStore,
        _permit: Permit,
    },
    Log {
        rollouts: Vec<RolloutRecord>,
        scores: Vec<ScoreRecord>,
        preferences: Vec<Preference>,
        _permit: Permit,
        reply: Reply<()>,
    },
}
local_message!(ArchivistMsg);

/// A function of the store that sends its own reply.
type ReadStore = Box<dyn FnOnce(&Store) + Send>;

pub(crate) struct Archivist {
    store: Store,
}

impl Archivist {
    fn checkpoint(&mut self, checkpoint: &JobCheckpoint) -> Result<SavedCheckpoint> {
        let mut names = Vec::new();
        let mut tensors = Vec::new();
        for (role, model) in &checkpoint.models {
            for (name, tensor) in &model.tensors {
                names.push(stored_name(role, name));
                tensors.push(tensor.to_device(&Device::Cpu)?.contiguous()?);
            }
        }
        let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
        let mut views = Vec::with_capacity(names.len());
        for ((name, tensor), (storage, layout)) in names.into_iter().zip(&tensors).zip(&guards) {
            let Some((from, to)) = layout.contiguous_offsets() else {
                return Err(Error::Checkpoint(format!("tensor `{name}` is not contiguous")));
            };
            let data = bytes(&name, storage, from..to)?;
            let dtype = stored_dtype(&name, tensor.dtype())?;
            views.push(TensorBytes { name, dtype, shape: tensor.dims().to_vec(), data });
        }
        let models = checkpoint.models.iter().map(|(role, model)| (role.clone(), model.counters())).collect();
        Ok(self.store.save_checkpoint(checkpoint.step, &models, &views, &checkpoint.state, checkpoint.keep)?)
    }

    fn replay(&self, step: u64) -> Result<Replay> {
        Ok(Replay { rollouts: self.store.rollouts(step)?, scores: self.store.scores(step)? })
    }

    fn log(&mut self, rollouts: &[RolloutRecord], scores: &[ScoreRecord], preferences: &[Preference]) -> Result<()> {
        if !rollouts.is_empty() {
            self.store.log_rollouts(rollouts)?;
        }
        if !scores.is_empty() {
            self.store.log_scores(scores)?;
        }
        if !preferences.is_empty() {
            self.store.log_preferences(preferences)?;
        }
        Ok(())
    }
}

impl Archivist {
    /// The newest undamaged checkpoint, with a note for each repair and each damaged one.
    fn restore(&self) -> Result<(Option<Restored>, Vec<Repair>)> {
        let (restored, mut notes) = Restored::latest(&self.store)?;
        notes.extend(self.store.repairs());
        Ok((restored, notes))
    }
}

impl StateMachine for Archivist {
    type Message = ArchivistMsg;

    fn apply(&mut self, message: ArchivistMsg) {
        self.handle(message);
        for repair in self.store.repairs() {
            tracing::warn!("{}", repair.0);
        }
    }
}

impl Archivist {
    fn handle(&mut self, message: ArchivistMsg) {
        match message {
            ArchivistMsg::Checkpoint { checkpoint, reply, .. } => answer(reply, self.checkpoint(&checkpoint)),
            ArchivistMsg::Restore { reply, .. } => answer(reply, self.restore()),
            ArchivistMsg::Replay { step, reply, .. } => answer(reply, self.replay(step)),
            ArchivistMsg::CachedReplies { keys, reply, .. } => {
                answer(reply, keys.iter().map(|key| Ok(self.store.cached_reply(key)?)).collect())
            }
            ArchivistMsg::CacheReplies { entries, spent, reply, .. } => {
                answer(reply, self.store.cache_replies(&entries, spent).map_err(Error::from))
            }
            ArchivistMsg::Spent { reply, .. } => answer(reply, self.store.spent().map_err(Error::from)),
            ArchivistMsg::Read { read, .. } => read(&self.store),
            ArchivistMsg::Log { rollouts, scores, preferences, reply, .. } => {
                answer(reply, self.log(&rollouts, &scores, &preferences))
            }
        }
    }
}

/// Callback for a full disk; called before each wait for free space.
pub type OnFullDisk = Arc<dyn Fn(&StoreError) + Send + Sync>;

/// Handle to the archivist.
///
/// Requests that write wait while the disk is full, so the job pauses until there is space.
#[derive(Clone)]
pub struct ArchivistHandle {
    pub(crate) link: Link<ArchivistMsg>,
    pub(crate) on_full_disk: OnFullDisk,
}

impl ArchivistHandle {
    /// The first archivist owns `store`, which the caller has opened; a restarted one opens the directory again.
    pub(crate) fn build(store: Store) -> Build<Archivist> {
        let directory: PathBuf = store.directory().into();
        let first = Mutex::new(Some(store));
        Arc::new(move || {
            let store = first.lock().unwrap_or_else(PoisonError::into_inner).take();
            let store = match store {
                Some(store) => store,
                None => Store::open(&directory)?.0,
            };
            Ok(Archivist { store })
        })
    }

    /// Saves a checkpoint durably, and deletes older checkpoints and the logged rollouts that none of the kept ones needs.
    pub async fn checkpoint(&self, checkpoint: &JobCheckpoint) -> Result<SavedCheckpoint> {
        self.with_room(|| {
            let checkpoint = Box::new(checkpoint.clone());
            self.link.ask("checkpoint", |_permit, reply| ArchivistMsg::Checkpoint { checkpoint, _permit, reply })
        })
        .await
    }

    /// Reads the newest undamaged checkpoint, if there is one, and a note for each newer one that is damaged.
    pub async fn restore(&self) -> Result<(Option<Restored>, Vec<Repair>)> {
        self.link.ask("restore", |_permit, reply| ArchivistMsg::Restore { _permit, reply }).await
    }

    /// Reads the logged rollouts and scores of a step.
    pub async fn replay(&self, step: u64) -> Result<Replay> {
        self.link.ask("replay", |_permit, reply| ArchivistMsg::Replay { step, _permit, reply }).await
    }

    /// Looks up cached replies of judges by the hashes of their requests, in the order of `keys`.
    pub async fn cached_replies(&self, keys: Vec<String>) -> Result<Vec<Option<CachedReply>>> {
        self.link.ask("known replies", |_permit, reply| ArchivistMsg::CachedReplies { keys, _permit, reply }).await
    }

    /// Caches replies of judges by the hashes of their requests, and adds `spent` to the job's usage.
    pub async fn cache_replies(&self, entries: Vec<(String, CachedReply)>, spent: Usage) -> Result<()> {
        self.with_room(|| {
            let entries = entries.clone();
            self.link.ask("save replies", |_permit, reply| ArchivistMsg::CacheReplies {
                entries,
                spent,
                _permit,
                reply,
            })
        })
        .await
    }

    /// The usage of all requests that the job has made to judges.
    pub async fn spent(&self) -> Result<Usage> {
        self.link.ask("budget", |_permit, reply| ArchivistMsg::Spent { _permit, reply }).await
    }

    /// Runs `read` on the store, on the archivist's thread, between two of its other requests. Long reads delay the job:
    /// read large ledgers page by page.
    pub async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> rehearsal_store::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.link
            .ask("read", |_permit, reply| {
                let read: ReadStore = Box::new(move |store| answer(reply, read(store).map_err(Error::from)));
                ArchivistMsg::Read { read, _permit }
            })
            .await
    }

    /// Logs finished rollouts.
    pub async fn log_rollouts(&self, rollouts: Vec<RolloutRecord>) -> Result<()> {
        self.log(rollouts, Vec::new(), Vec::new()).await
    }

    /// Logs scores of rollouts.
    pub async fn log_scores(&self, scores: Vec<ScoreRecord>) -> Result<()> {
        self.log(Vec::new(), scores, Vec::new()).await
    }

    /// Writes comparisons to the preference ledger.
    pub async fn log_preferences(&self, preferences: Vec<Preference>) -> Result<()> {
        self.log(Vec::new(), Vec::new(), preferences).await
    }

    async fn log(
        &self,
        rollouts: Vec<RolloutRecord>,
        scores: Vec<ScoreRecord>,
        preferences: Vec<Preference>,
    ) -> Result<()> {
        self.with_room(|| {
            let (rollouts, scores, preferences) = (rollouts.clone(), scores.clone(), preferences.clone());
            self.link.ask("log", |_permit, reply| ArchivistMsg::Log { rollouts, scores, preferences, _permit, reply })
        })
        .await
    }

    async fn with_room<T, F: Future<Output = Result<T>>>(&self, request: impl Fn() -> F) -> Result<T> {
        loop {
            match request().await {
                Err(Error::Store(full @ StoreError::DiskFull { .. })) => {
                    (self.on_full_disk)(&full);
                    let _wait = self.link.wait("space on the disk");
                    tokio::time::sleep(FULL_DISK_RETRY).await;
                }
                other => return other,
            }
        }
    }
}
role_status!(ArchivistHandle);
