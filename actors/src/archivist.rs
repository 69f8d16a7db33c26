//! The archivist: the store, on a thread of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rehearsal_store::{
    Error as StoreError, KeptReply, Preference, Repair, Rollout, SavedCheckpoint, Store, TensorBytes, Usage, Verdict,
};

use crate::role::{Build, Link, Machine, Reply, Ticket, answer, local_message, role_status};
use crate::snapshot::{stored_dtype, stored_name, unstored_type};
use crate::{Error, ModelSnapshot, Restored, Result};

/// How long to wait for room on a full disk before trying again.
const FULL_DISK_RETRY: Duration = Duration::from_secs(2);

/// All that a job needs to go on.
#[derive(Clone)]
pub struct JobCheckpoint {
    /// Steps done.
    pub step: u64,
    /// Trained models by role.
    pub models: BTreeMap<String, ModelSnapshot>,
    /// The job's own state, as bytes.
    pub state: Vec<u8>,
    /// Checkpoints to keep.
    pub keep: usize,
}

/// What a step left in the log before it was cut off.
#[derive(Debug, Default, Clone)]
pub struct Replay {
    pub rollouts: Vec<Rollout>,
    pub verdicts: Vec<Verdict>,
}

pub(crate) enum ArchivistMsg {
    Checkpoint {
        checkpoint: Box<JobCheckpoint>,
        _ticket: Ticket,
        reply: Reply<SavedCheckpoint>,
    },
    Restore {
        _ticket: Ticket,
        reply: Reply<(Option<Restored>, Vec<Repair>)>,
    },
    Replay {
        step: u64,
        _ticket: Ticket,
        reply: Reply<Replay>,
    },
    Recall {
        keys: Vec<String>,
        _ticket: Ticket,
        reply: Reply<Vec<Option<KeptReply>>>,
    },
    Remember {
        entries: Vec<(String, KeptReply)>,
        spent: Usage,
        _ticket: Ticket,
        reply: Reply<()>,
    },
    Spent {
        _ticket: Ticket,
        reply: Reply<Usage>,
    },
    Log {
        rollouts: Vec<Rollout>,
        verdicts: Vec<Verdict>,
        preferences: Vec<Preference>,
        _ticket: Ticket,
        reply: Reply<()>,
    },
}
local_message!(ArchivistMsg);

pub(crate) struct Archivist {
    /// Open while the role lives; the cell hands it to the next incarnation.
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
                return Err(Error::Checkpoint(format!("`{name}` is not contiguous")));
            };
            let data: &[u8] = match &**storage {
                Storage::Cpu(CpuStorage::F32(x)) => bytemuck::cast_slice(&x[from..to]),
                Storage::Cpu(CpuStorage::F64(x)) => bytemuck::cast_slice(&x[from..to]),
                Storage::Cpu(CpuStorage::BF16(x)) => bytemuck::cast_slice(&x[from..to]),
                Storage::Cpu(CpuStorage::U8(x)) => &x[from..to],
                _ => return Err(unstored_type(&name, tensor.dtype())),
            };
            let dtype = stored_dtype(&name, tensor.dtype())?;
            views.push(TensorBytes { name, dtype, shape: tensor.dims().to_vec(), data });
        }
        let models = checkpoint.models.iter().map(|(role, model)| (role.clone(), model.counters())).collect();
        let saved = self.store.save_checkpoint(checkpoint.step, &models, &views, &checkpoint.state, checkpoint.keep)?;
        self.store.forget_rollouts_before(checkpoint.step)?;
        Ok(saved)
    }

    fn replay(&self, step: u64) -> Result<Replay> {
        Ok(Replay { rollouts: self.store.rollouts(step)?, verdicts: self.store.verdicts(step)? })
    }

    fn log(&mut self, rollouts: &[Rollout], verdicts: &[Verdict], preferences: &[Preference]) -> Result<()> {
        if !rollouts.is_empty() {
            self.store.log_rollouts(rollouts)?;
        }
        if !verdicts.is_empty() {
            self.store.log_verdicts(verdicts)?;
        }
        if !preferences.is_empty() {
            self.store.log_preferences(preferences)?;
        }
        Ok(())
    }
}

impl Machine for Archivist {
    type Message = ArchivistMsg;

    fn apply(&mut self, message: ArchivistMsg) {
        match message {
            ArchivistMsg::Checkpoint { checkpoint, reply, .. } => answer(reply, self.checkpoint(&checkpoint)),
            ArchivistMsg::Restore { reply, .. } => answer(reply, Restored::latest(&self.store)),
            ArchivistMsg::Replay { step, reply, .. } => answer(reply, self.replay(step)),
            ArchivistMsg::Recall { keys, reply, .. } => {
                answer(reply, keys.iter().map(|key| Ok(self.store.recall(key)?)).collect())
            }
            ArchivistMsg::Remember { entries, spent, reply, .. } => {
                answer(reply, self.store.remember(&entries, spent).map_err(Error::from))
            }
            ArchivistMsg::Spent { reply, .. } => answer(reply, self.store.spent().map_err(Error::from)),
            ArchivistMsg::Log { rollouts, verdicts, preferences, reply, .. } => {
                answer(reply, self.log(&rollouts, &verdicts, &preferences))
            }
        }
    }
}

/// Called when the disk is full, each time before the archivist waits for room.
pub type OnFullDisk = Arc<dyn Fn(&StoreError) + Send + Sync>;

/// Speaks to the archivist. Writing waits while the disk is full: the job pauses and goes on when there is room.
#[derive(Clone)]
pub struct ArchivistHandle {
    pub(crate) link: Link<ArchivistMsg>,
    pub(crate) on_full_disk: OnFullDisk,
}

impl ArchivistHandle {
    /// `store` is opened by the caller, whom its errors concern; a restarted archivist opens the directory again.
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

    /// Saves a checkpoint durably and lets go of old ones and of the rollouts it makes superfluous.
    pub async fn checkpoint(&self, checkpoint: &JobCheckpoint) -> Result<SavedCheckpoint> {
        self.with_room(|| {
            let checkpoint = Box::new(checkpoint.clone());
            self.link.ask(|_ticket, reply| ArchivistMsg::Checkpoint { checkpoint, _ticket, reply })
        })
        .await
    }

    /// The newest checkpoint that is whole, if any, and notes on those that are not.
    pub async fn restore(&self) -> Result<(Option<Restored>, Vec<Repair>)> {
        self.link.ask(|_ticket, reply| ArchivistMsg::Restore { _ticket, reply }).await
    }

    /// What is logged of a step.
    pub async fn replay(&self, step: u64) -> Result<Replay> {
        self.link.ask(|_ticket, reply| ArchivistMsg::Replay { step, _ticket, reply }).await
    }

    /// What a judge said when it was asked the same, by the hash of the question.
    pub async fn recall(&self, keys: Vec<String>) -> Result<Vec<Option<KeptReply>>> {
        self.link.ask(|_ticket, reply| ArchivistMsg::Recall { keys, _ticket, reply }).await
    }

    /// Keeps what a judge said, and adds up what it cost.
    pub async fn remember(&self, entries: Vec<(String, KeptReply)>, spent: Usage) -> Result<()> {
        self.with_room(|| {
            let entries = entries.clone();
            self.link.ask(|_ticket, reply| ArchivistMsg::Remember { entries, spent, _ticket, reply })
        })
        .await
    }

    /// What all questions of the job have cost.
    pub async fn spent(&self) -> Result<Usage> {
        self.link.ask(|_ticket, reply| ArchivistMsg::Spent { _ticket, reply }).await
    }

    /// Logs finished rollouts.
    pub async fn log_rollouts(&self, rollouts: Vec<Rollout>) -> Result<()> {
        self.log(rollouts, Vec::new(), Vec::new()).await
    }

    /// Logs verdicts, before anything is done with them.
    pub async fn log_verdicts(&self, verdicts: Vec<Verdict>) -> Result<()> {
        self.log(Vec::new(), verdicts, Vec::new()).await
    }

    /// Writes comparisons into the ledger.
    pub async fn log_preferences(&self, preferences: Vec<Preference>) -> Result<()> {
        self.log(Vec::new(), Vec::new(), preferences).await
    }

    async fn log(&self, rollouts: Vec<Rollout>, verdicts: Vec<Verdict>, preferences: Vec<Preference>) -> Result<()> {
        self.with_room(|| {
            let (rollouts, verdicts, preferences) = (rollouts.clone(), verdicts.clone(), preferences.clone());
            self.link.ask(|_ticket, reply| ArchivistMsg::Log { rollouts, verdicts, preferences, _ticket, reply })
        })
        .await
    }

    async fn with_room<T, F: Future<Output = Result<T>>>(&self, request: impl Fn() -> F) -> Result<T> {
        loop {
            match request().await {
                Err(Error::Store(full @ StoreError::DiskFull { .. })) => {
                    (self.on_full_disk)(&full);
                    tokio::time::sleep(FULL_DISK_RETRY).await;
                }
                other => return other,
            }
        }
    }
}
role_status!(ArchivistHandle);
