//! The director: starts the roles of a job, supervises and restarts them, and publishes their status.

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
use crate::role::{Build, Link, StateMachine, local_message};
use crate::sampler::Sampler;
use crate::trained::{Trained, check_head};
use crate::{
    ArchivistHandle, BufferHandle, CriticHandle, Devices, Error, Placement, PolicyHandle, ReferenceHandle, Result,
    Reward, RewardHandle, SamplerConfig, SamplerHandle, TrainedConfig, Waits,
};

/// Capacity of a role's mailbox in messages; senders wait when it is full.
const MAILBOX_CAPACITY: usize = 64;

/// How long the end of a job waits for a role to finish its current request.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// The same for the reward, which owns nothing that must be released before the job can be resumed. A call of a host's
/// closure cannot be interrupted.
const REWARD_STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// Status of a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoleStatus {
    /// It takes requests.
    Running {
        /// How often it was restarted.
        restarts: u32,
    },
    /// It stopped more often than it may be restarted, or could not be restarted.
    GaveUp {
        /// How often it was restarted.
        restarts: u32,
        /// Why it stopped last.
        reason: String,
    },
}

/// What the director did about a role that stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DirectorEvent {
    /// It was started again.
    Restarted {
        /// Name of the role.
        role: &'static str,
        /// Why it stopped.
        reason: String,
        /// How often it was restarted.
        restarts: u32,
    },
    /// It is not started again.
    GaveUp {
        /// Name of the role.
        role: &'static str,
        /// Why it stopped.
        reason: String,
        /// How often it was restarted.
        restarts: u32,
    },
}

type Respawn = Arc<dyn Fn(ActorCell, u32) -> Pin<Box<dyn Future<Output = Result<ActorCell>> + Send>> + Send + Sync>;

enum DirectorMsg {
    Spawn { role: &'static str, respawn: Respawn, reply: oneshot::Sender<Result<()>> },
    Stop { reply: oneshot::Sender<()> },
}
local_message!(DirectorMsg);

/// Supervisor of the roles of one job. The roles stop when it is dropped or [stopped](Director::stop).
pub struct Director {
    actor: ActorRef<DirectorMsg>,
    status: watch::Receiver<BTreeMap<&'static str, RoleStatus>>,
    paused: watch::Sender<bool>,
    job: String,
    deadline: Duration,
    waits: Waits,
}

/// Number of directors started so far: it keeps the names of jobs apart in ractor's process-wide registry.
static JOBS: AtomicU32 = AtomicU32::new(0);

impl Director {
    /// Starts the director of one job. It restarts a role at most `restarts_max` times. `deadline` bounds every request to
    /// a role. Restarts are sent to `events`.
    ///
    /// # Errors
    ///
    /// [`Error::Start`] if the actor cannot be spawned.
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
        Ok(Self { actor, status, paused: watch::channel(false).0, job, deadline, waits: Waits::default() })
    }

    /// What is waited for, of roles and by them.
    pub fn waits(&self) -> Waits {
        self.waits.clone()
    }

    /// Starts the policy: a trained model with a language-model head.
    pub async fn policy(
        &self,
        checkpoint: Arc<Checkpoint>,
        config: TrainedConfig,
        devices: Devices,
    ) -> Result<PolicyHandle> {
        check_head(&checkpoint, HeadKind::Language, "policy")?;
        let link = Link::new("policy", MAILBOX_CAPACITY, self.deadline, self.waits.clone());
        self.spawn(&link, Trained::build(checkpoint, config, devices), "policy").await?;
        Ok(PolicyHandle { link })
    }

    /// Starts the critic or a reward model in training: a trained model with a score head.
    pub async fn critic(
        &self,
        checkpoint: Arc<Checkpoint>,
        config: TrainedConfig,
        devices: Devices,
    ) -> Result<CriticHandle> {
        check_head(&checkpoint, HeadKind::Score, "critic")?;
        let link = Link::new("critic", MAILBOX_CAPACITY, self.deadline, self.waits.clone());
        self.spawn(&link, Trained::build(checkpoint, config, devices), "critic").await?;
        Ok(CriticHandle { link })
    }

    /// Starts the sampler, which generates with weights of a policy that started as `checkpoint`.
    pub async fn sampler(
        &self,
        checkpoint: Arc<Checkpoint>,
        config: SamplerConfig,
        devices: Devices,
    ) -> Result<SamplerHandle> {
        check_head(&checkpoint, HeadKind::Language, "sampler")?;
        let link = Link::new("sampler", MAILBOX_CAPACITY, self.deadline, self.waits.clone());
        self.spawn(&link, Sampler::build(checkpoint, config, devices), "sampler").await?;
        Ok(SamplerHandle { link })
    }

    /// Starts the reference, a frozen model that is run in micro-batches of at most `micro_batch_tokens` tokens.
    pub async fn reference(
        &self,
        checkpoint: Arc<Checkpoint>,
        placement: Placement,
        micro_batch_tokens: usize,
        precision: rehearsal_lm::Precision,
        devices: Devices,
    ) -> Result<ReferenceHandle> {
        let link = Link::new("reference", MAILBOX_CAPACITY, self.deadline, self.waits.clone());
        self.spawn(
            &link,
            ReferenceHandle::build(checkpoint, placement, micro_batch_tokens, precision, devices),
            "reference",
        )
        .await?;
        Ok(ReferenceHandle { link })
    }

    /// Starts the reward, whose requests may take as long as its [timeout](Reward::timeout).
    pub async fn reward(&self, reward: Arc<dyn Reward>) -> Result<RewardHandle> {
        let link = Link::new("reward", MAILBOX_CAPACITY, reward.timeout().unwrap_or(self.deadline), self.waits.clone());
        let (name, is_relative, placements) = (reward.name().into(), reward.is_relative(), reward.placements().into());
        let (batch, may_be_abandoned) = (reward.batch(), reward.may_be_abandoned());
        self.spawn(&link, RewardHandle::build(reward), "reward").await?;
        Ok(RewardHandle { link, name, is_relative, placements, batch, may_be_abandoned })
    }

    /// Starts the buffer for prompts of `group_size` completions each. It holds at most `rollouts_max` completions, and drops
    /// those whose policy is more than `staleness_max` updates old.
    pub async fn buffer(&self, group_size: usize, rollouts_max: usize, staleness_max: u64) -> Result<BufferHandle> {
        let link = Link::new("buffer", MAILBOX_CAPACITY, self.deadline, self.waits.clone());
        self.spawn(&link, BufferHandle::build(group_size, rollouts_max, staleness_max), "buffer").await?;
        Ok(BufferHandle { link })
    }

    /// Starts the archivist, which takes over an open store. `on_full_disk` is called before each wait for free space.
    pub async fn archivist(&self, store: Store, on_full_disk: OnFullDisk) -> Result<ArchivistHandle> {
        let link = Link::new("archivist", MAILBOX_CAPACITY, self.deadline, self.waits.clone());
        self.spawn(&link, ArchivistHandle::build(store), "archivist").await?;
        Ok(ArchivistHandle { link, on_full_disk })
    }

    pub(crate) async fn spawn<M: StateMachine>(
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

    /// The status of every role.
    pub fn status(&self) -> BTreeMap<&'static str, RoleStatus> {
        self.status.borrow().clone()
    }

    /// The error of a role that is not restarted any more, if there is one.
    pub fn failure(&self) -> Option<Error> {
        self.status().into_iter().find_map(|(role, status)| match status {
            RoleStatus::GaveUp { restarts, reason } => Some(Error::GaveUp { role, restarts, reason }),
            RoleStatus::Running { .. } => None,
        })
    }

    /// Pauses the job at its next step boundary while it holds `true`.
    pub fn pause_switch(&self) -> watch::Sender<bool> {
        self.paused.clone()
    }

    /// Whether the job is paused, or will be at its next step boundary.
    pub fn is_paused(&self) -> bool {
        *self.paused.borrow()
    }

    /// Waits while the job is paused.
    pub async fn wait_while_paused(&self) {
        let mut paused = self.paused.subscribe();
        let _ = paused.wait_for(|paused| !paused).await; // the sender lives as long as `self`
    }

    /// Waits until roles have been restarted `restarts` times in all, or until one is not restarted any more.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if that takes longer than a request may.
    pub async fn wait_for_restarts(&self, restarts: u32) -> Result<()> {
        let _wait = self.waits.enter("director", "restart of a role");
        let mut status = self.status.clone();
        let done = |all: &BTreeMap<&'static str, RoleStatus>| {
            let given_up = all.values().any(|s| matches!(s, RoleStatus::GaveUp { .. }));
            given_up || restarts_of(all) >= restarts
        };
        let late = |_| Error::Timeout { role: "director", after: self.deadline };
        // A director that has stopped restarts nothing.
        tokio::time::timeout(self.deadline, status.wait_for(done)).await.map(drop).map_err(late)
    }

    /// Number of restarts of all roles so far.
    pub fn restarts(&self) -> u32 {
        restarts_of(&self.status.borrow())
    }

    /// Stops every role and waits until each has released what it owns: the store, the devices.
    pub async fn stop(&self) {
        let (reply, done) = oneshot::channel();
        if self.actor.cast(DirectorMsg::Stop { reply }).is_ok() {
            let _ = done.await; // an error means that it has stopped already
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

    /// Restarts a role that stopped, unless it has used up its restarts or cannot be started.
    async fn restart(&mut self, id: ActorId, reason: String, myself: ActorCell) {
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
                tracing::warn!(role, reason, restarts, "a role stopped and was restarted");
                let _ = self.events.send(DirectorEvent::Restarted { role, reason, restarts });
                self.set(role, RoleStatus::Running { restarts });
            }
            Err(reason) => {
                tracing::error!(role, reason, restarts, "a role stopped and is not restarted");
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
                let _ = reply.send(result); // the caller may have been dropped
            }
            DirectorMsg::Stop { reply } => {
                for (name, role) in std::mem::take(&mut state.roles) {
                    let patience = if name == "reward" { REWARD_STOP_TIMEOUT } else { STOP_TIMEOUT };
                    // An error means that it has stopped already, or is left to end by itself.
                    let _ = role.cell.stop_and_wait(None, Some(patience)).await;
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
                state.restart(cell.get_id(), error.to_string(), myself.get_cell()).await
            }
            SupervisionEvent::ActorTerminated(cell, _, Some(reason)) => {
                state.restart(cell.get_id(), reason, myself.get_cell()).await
            }
            // A start, or a stop without a reason, which only the end of the job causes.
            _ => {}
        }
        Ok(())
    }
}
