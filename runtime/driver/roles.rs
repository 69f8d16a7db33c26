//! The roles of a job as the driver sees them: what it checkpoints, clears, and watches.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::DType;
use rehearsal_actors::{
    ArchivistHandle, BufferHandle, CriticHandle, Director, ModelSnapshot, PolicyHandle, ReferenceHandle, RoleLoad,
    StepReport, UpdateBatch,
};
use tokio_util::sync::CancellationToken;

use super::rollouts::Schedule;
use crate::nodes::Coordinator;

/// A role whose weights are part of every checkpoint.
#[derive(Clone)]
pub enum TrainedModel {
    Policy(PolicyHandle),
    Critic(CriticHandle),
}

/// Calls a method that policy and critic share.
macro_rules! either {
    ($model:expr, $handle:ident => $call:expr) => {
        match $model {
            TrainedModel::Policy($handle) => $call,
            TrainedModel::Critic($handle) => $call,
        }
    };
}

impl TrainedModel {
    /// Its name in checkpoints.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Policy(_) => "policy",
            Self::Critic(_) => "critic",
        }
    }

    /// A copy that shares storage with the weights until they change.
    pub async fn snapshot(&self) -> rehearsal_actors::Result<ModelSnapshot> {
        either!(self, handle => handle.snapshot().await)
    }

    /// Returns to a snapshot.
    pub async fn restore(&self, snapshot: ModelSnapshot) -> rehearsal_actors::Result<()> {
        either!(self, handle => handle.restore(snapshot).await)
    }

    /// Returns to the start of training.
    pub async fn reset(&self) -> rehearsal_actors::Result<()> {
        either!(self, handle => handle.reset().await)
    }

    /// One optimizer step.
    pub async fn step(&self, batch: UpdateBatch, cancel: CancellationToken) -> rehearsal_actors::Result<StepReport> {
        either!(self, handle => handle.step(batch, cancel).await)
    }

    /// Writes the model as a Hugging Face directory.
    pub async fn export(&self, directory: PathBuf, dtype: DType) -> rehearsal_actors::Result<()> {
        either!(self, handle => handle.export(directory, dtype).await)
    }
}

/// All roles of a job.
pub struct Roles {
    pub director: Director,
    pub archivist: ArchivistHandle,
    /// Roles whose weights are checkpointed. The first is updated by `Run::learn` and exported at the end.
    pub trained: Vec<TrainedModel>,
    /// The reference, if the algorithm has one.
    pub reference: Option<ReferenceHandle>,
    /// Emptied when the job returns to a checkpoint.
    pub buffer: Option<BufferHandle>,
    /// Returns to the checkpoint too, which holds its weights.
    pub schedule: Option<Arc<Schedule>>,
    /// Where other processes join to generate.
    pub nodes: Option<Arc<Coordinator>>,
    watched: Vec<(&'static str, Box<dyn RoleLoad>)>,
}

impl Roles {
    /// The roles that every job has.
    pub fn new(director: Director, archivist: ArchivistHandle) -> Self {
        let watched: Vec<(_, Box<dyn RoleLoad>)> = vec![("archivist", Box::new(archivist.clone()))];
        Self {
            director,
            archivist,
            trained: Vec::new(),
            reference: None,
            buffer: None,
            schedule: None,
            nodes: None,
            watched,
        }
    }

    /// Adds a role whose load is exported.
    pub fn watch(&mut self, role: &'static str, handle: &(impl RoleLoad + Clone + 'static)) {
        self.watched.push((role, Box::new(handle.clone())));
    }

    /// Every role with the seconds it has worked and the messages that wait for it.
    pub fn loads(&self) -> impl Iterator<Item = (&'static str, f64, usize)> {
        self.watched.iter().map(|(role, handle)| (*role, handle.stats().busy().as_secs_f64(), handle.depth()))
    }
}
