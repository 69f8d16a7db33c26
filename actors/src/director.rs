//! The director: starts the roles, restarts those that die, and says how they are.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use rehearsal_lm::{Checkpoint, HeadKind};
use rehearsal_store::Store;
use tokio::sync::{mpsc, oneshot, watch};

use crate::archivist::OnFullDisk;
use crate::role::{Build, Link, Machine, local_message};
use crate::trained::{Trained, check_head};
use crate::{
    ArchivistHandle, BufferHandle, CriticHandle, Devices, Error, Placement, PolicyHandle, ReferenceHandle, Result,
    Reward, RewardHandle, TrainedConfig,
};

/// Messages a role may have waiting; a sender waits beyond that.
const MAILBOX: usize = 64;

/// Time a role has to finish what it is doing when the job ends.
const STOP: Duration = Duration::from_secs(60);

/// How a role is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoleStatus {
    Running {
        restarts: u32,
    },
    /// It died more often than it may.
    GaveUp {
        restarts: u32,
        reason: String,
    },
}

/// Something the director did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectorEvent {
    Restarted { role: &'static str, reason: String, restarts: u32 },
    GaveUp { role: &'static str, reason: String, restarts: u32 },
}

type Respawn = Arc<dyn Fn(ActorCell, u32) -> Pin<Box<dyn Future<Output = Result<ActorCell>> + Send>> + Send + Sync>;

enum DirectorMsg {
    Spawn { role: &'static str, respawn: Respawn, reply: oneshot::Sender<Result<()>> },
    Stop { reply: oneshot::Sender<()> },
}
local_message!(DirectorMsg);

/// Owns the roles of one job; when it is dropped or [stopped](Director::stop), they stop.
pub struct Director {
    actor: ActorRef<DirectorMsg>,
    status: watch::Receiver<BTreeMap<&'static str, RoleStatus>>,
    paused: watch::Sender<bool>,
    job: String,
    deadline: Duration,
}

/// Distinguishes jobs in ractor's process-wide registry.
static JOBS: AtomicU32 = AtomicU32::new(0);

impl Director {
    /// A director for one job. A role that dies more than `restarts_max` times stays dead. `deadline` bounds every
    /// request to a role.
    pub async fn start(
        restarts_max: u32,
        deadline: Duration,
        events: mpsc::UnboundedSender<DirectorEvent>,
    ) -> Result<Self> {
        let job = format!("rehearsal-{}-{}", std::process::id(), JOBS.fetch_add(1, Ordering::Relaxed));
        let (publish, status) = watch::channel(BTreeMap::new());
        let arguments = State { roles: BTreeMap::new(), restarts_max, events, publish };
        let started = Actor::spawn(Some(format!("{job}-director")), DirectorActor, arguments).await;
        let (actor, _) = started.map_err(|e| Error::Start { role: "director", reason: e.to_string() })?;
        Ok(Self { actor, status, paused: watch::channel(false).0, job, deadline })
    }

    /// Starts the policy.
    pub async fn policy(
        &self,
        checkpoint: Arc<Checkpoint>,
        config: TrainedConfig,
        devices: Devices,
    ) -> Result<PolicyHandle> {
        check_head(&checkpoint, HeadKind::Language, "policy")?;
        let link = Link::new("policy", MAILBOX, self.deadline);
        self.spawn(&link, Trained::build(checkpoint, config, devices), "policy").await?;
        Ok(PolicyHandle { link })
    }

    /// Starts the critic, or a reward model in training.
    pub async fn critic(
        &self,
        checkpoint: Arc<Checkpoint>,
        config: TrainedConfig,
        devices: Devices,
    ) -> Result<CriticHandle> {
        check_head(&checkpoint, HeadKind::Score, "critic")?;
        let link = Link::new("critic", MAILBOX, self.deadline);
        self.spawn(&link, Trained::build(checkpoint, config, devices), "critic").await?;
        Ok(CriticHandle { link })
    }

    /// Starts the reference.
    pub async fn reference(
        &self,
        checkpoint: Arc<Checkpoint>,
        placement: Placement,
        micro_batch_tokens: usize,
        precision: rehearsal_lm::Precision,
        devices: Devices,
    ) -> Result<ReferenceHandle> {
        let link = Link::new("reference", MAILBOX, self.deadline);
        self.spawn(
            &link,
            ReferenceHandle::build(checkpoint, placement, micro_batch_tokens, precision, devices),
            "reference",
        )
        .await?;
        Ok(ReferenceHandle { link })
    }

    /// Starts the reward.
    pub async fn reward(&self, reward: Arc<dyn Reward>) -> Result<RewardHandle> {
        let link = Link::new("reward", MAILBOX, reward.patience().unwrap_or(self.deadline));
        let (name, compares, occupies) = (reward.name().into(), reward.compares(), reward.occupies().into());
        self.spawn(&link, RewardHandle::build(reward), "reward").await?;
        Ok(RewardHandle { link, name, compares, occupies })
    }

    /// Starts the buffer; a prompt has `group_size` completions.
    pub async fn buffer(&self, group_size: usize, rollouts_max: usize, staleness_max: u64) -> Result<BufferHandle> {
        let link = Link::new("buffer", MAILBOX, self.deadline);
        self.spawn(&link, BufferHandle::build(group_size, rollouts_max, staleness_max), "buffer").await?;
        Ok(BufferHandle { link })
    }

    /// Starts the archivist over an open store.
    pub async fn archivist(&self, store: Store, on_full_disk: OnFullDisk) -> Result<ArchivistHandle> {
        let link = Link::new("archivist", MAILBOX, self.deadline);
        self.spawn(&link, ArchivistHandle::build(store), "archivist").await?;
        Ok(ArchivistHandle { link, on_full_disk })
    }

    pub(crate) async fn spawn<M: Machine>(
        &self,
        link: &Link<M::Message>,
        build: Build<M>,
        role: &'static str,
    ) -> Result<()> {
        let (link, job) = (link.clone(), self.job.clone());
        let respawn: Respawn = Arc::new(move |supervisor, incarnation| {
            let (link, build, name) = (link.clone(), build.clone(), format!("{job}-{role}-{incarnation}"));
            Box::pin(async move { link.start(build, name, supervisor).await })
        });
        let (reply, answer) = oneshot::channel();
        let gone = || Error::Died { role: "director", reason: None };
        self.actor.cast(DirectorMsg::Spawn { role, respawn, reply }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// How every role is.
    pub fn status(&self) -> BTreeMap<&'static str, RoleStatus> {
        self.status.borrow().clone()
    }

    /// The error of a role that is not started again, if there is one.
    pub fn failure(&self) -> Option<Error> {
        self.status().into_iter().find_map(|(role, status)| match status {
            RoleStatus::GaveUp { restarts, reason } => Some(Error::GaveUp { role, restarts, reason }),
            RoleStatus::Running { .. } => None,
        })
    }

    /// Holds the job at its next step boundary, or lets it go on.
    pub fn pause(&self, paused: bool) {
        self.paused.send_replace(paused);
    }

    /// Waits while the job is paused.
    pub async fn unpaused(&self) {
        let mut paused = self.paused.subscribe();
        let _ = paused.wait_for(|paused| !paused).await; // the sender lives as long as `self`
    }

    /// Waits until `restarts` deaths of roles have been dealt with, or until one is given up.
    pub async fn settled(&self, restarts: u32) {
        let mut status = self.status.clone();
        let dealt = |all: &BTreeMap<&'static str, RoleStatus>| {
            let given_up = all.values().any(|s| matches!(s, RoleStatus::GaveUp { .. }));
            given_up || restarts_of(all) >= restarts
        };
        let _ = status.wait_for(dealt).await; // a director that is gone has settled
    }

    /// Restarts of all roles so far.
    pub fn restarts(&self) -> u32 {
        restarts_of(&self.status.borrow())
    }

    /// Stops every role and waits until they have let go of what they own: the store, the devices.
    pub async fn stop(&self) {
        let (reply, done) = oneshot::channel();
        if self.actor.cast(DirectorMsg::Stop { reply }).is_ok() {
            let _ = done.await; // a director that is gone has stopped
        }
        self.actor.stop(None);
    }
}

impl Drop for Director {
    fn drop(&mut self) {
        self.actor.stop(None);
    }
}

fn restarts_of(all: &BTreeMap<&'static str, RoleStatus>) -> u32 {
    let of = |s: &RoleStatus| match s {
        RoleStatus::Running { restarts } | RoleStatus::GaveUp { restarts, .. } => *restarts,
    };
    all.values().map(of).sum()
}

struct DirectorActor;

struct Role {
    respawn: Respawn,
    cell: ActorCell,
    restarts: u32,
}

struct State {
    roles: BTreeMap<&'static str, Role>,
    restarts_max: u32,
    events: mpsc::UnboundedSender<DirectorEvent>,
    publish: watch::Sender<BTreeMap<&'static str, RoleStatus>>,
}

impl State {
    fn set(&self, role: &'static str, status: RoleStatus) {
        self.publish.send_modify(|all| {
            all.insert(role, status);
        });
    }

    /// A role died: start it again, unless it has died too often or cannot start.
    async fn revive(&mut self, id: ActorId, reason: String, myself: ActorCell) {
        let Some((&role, entry)) = self.roles.iter_mut().find(|(_, r)| r.cell.get_id() == id) else { return };
        entry.restarts += 1;
        let restarts = entry.restarts;
        let outcome = if restarts > self.restarts_max {
            Err(reason.clone())
        } else {
            (entry.respawn)(myself, restarts).await.map(|cell| entry.cell = cell).map_err(|e| e.to_string())
        };
        match outcome {
            Ok(()) => {
                tracing::warn!(role, reason, restarts, "a role died and was started again");
                let _ = self.events.send(DirectorEvent::Restarted { role, reason, restarts });
                self.set(role, RoleStatus::Running { restarts });
            }
            Err(reason) => {
                tracing::error!(role, reason, restarts, "a role died and is not started again");
                let _ = self.events.send(DirectorEvent::GaveUp { role, reason: reason.clone(), restarts });
                self.set(role, RoleStatus::GaveUp { restarts, reason });
            }
        }
    }
}

impl Actor for DirectorActor {
    type Msg = DirectorMsg;
    type State = State;
    type Arguments = State;

    async fn pre_start(
        &self,
        _: ActorRef<DirectorMsg>,
        state: State,
    ) -> std::result::Result<State, ActorProcessingErr> {
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<DirectorMsg>,
        message: DirectorMsg,
        state: &mut State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            DirectorMsg::Spawn { role, respawn, reply } => {
                let result = respawn(myself.get_cell(), 0).await.map(|cell| {
                    state.roles.insert(role, Role { respawn, cell, restarts: 0 });
                    state.set(role, RoleStatus::Running { restarts: 0 });
                });
                let _ = reply.send(result); // a caller that has gone needs no answer
            }
            DirectorMsg::Stop { reply } => {
                for role in std::mem::take(&mut state.roles).into_values() {
                    // One that is gone already has stopped.
                    let _ = role.cell.stop_and_wait(None, Some(STOP)).await;
                }
                let _ = reply.send(());
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<DirectorMsg>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(cell, error) => {
                state.revive(cell.get_id(), error.to_string(), myself.get_cell()).await
            }
            SupervisionEvent::ActorTerminated(cell, _, Some(reason)) => {
                state.revive(cell.get_id(), reason, myself.get_cell()).await
            }
            // Started, or stopped without a reason, which only a stop of the whole job does.
            _ => {}
        }
        Ok(())
    }
}
