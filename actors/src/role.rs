//! What all roles share: a state machine on its own thread, the actor that forwards messages to it, and the link from a
//! handle to the actor that currently runs.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};
use std::time::{Duration, Instant};

use ractor::rpc::CallResult;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, Message, RpcReplyPort};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::{Error, Result, Wait, Waits};

/// Port that the reply to a request is sent to.
pub(crate) type Reply<T> = RpcReplyPort<Result<T>>;

/// Replies to a request.
pub(crate) fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result); // the caller may have been dropped
}

/// Permit for a message in a role's bounded mailbox; released when the message has been handled.
pub(crate) struct Permit(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// The synchronous state of a role: takes messages and sends replies, without actors.
pub(crate) trait StateMachine: 'static {
    type Message: Message;

    fn apply(&mut self, message: Self::Message);
}

/// Builds a state machine on the thread that will own it; called again when the role is restarted.
pub(crate) type Build<M> = Arc<dyn Fn() -> Result<M> + Send + Sync>;

/// Counters of a role, over all its restarts.
#[derive(Debug, Default)]
pub struct RoleStats {
    busy_ns: AtomicU64,
    messages: AtomicU64,
}

impl RoleStats {
    /// Time spent handling messages.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.busy_ns.load(Ordering::Relaxed))
    }

    /// Number of messages handled, including the current one.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }
}

/// The actor that currently runs a role, and why the last one stopped.
pub(crate) struct Slot<Msg> {
    actor: RwLock<Option<ActorRef<Msg>>>,
    last_failure: Mutex<Option<String>>,
    pub stats: RoleStats,
}

impl<Msg> Slot<Msg> {
    fn failure(&self) -> Option<String> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Connection of a handle to its role: finds the current actor, bounds its mailbox and applies the deadline.
pub(crate) struct Link<Msg> {
    role: &'static str,
    slot: Arc<Slot<Msg>>,
    permits: Arc<Semaphore>,
    capacity: usize,
    deadline: Duration,
    waits: Waits,
}

impl<Msg> Clone for Link<Msg> {
    fn clone(&self) -> Self {
        Self { slot: self.slot.clone(), permits: self.permits.clone(), waits: self.waits.clone(), ..*self }
    }
}

impl<Msg: Message> Link<Msg> {
    pub fn new(role: &'static str, capacity: usize, deadline: Duration, waits: Waits) -> Self {
        let slot = Slot { actor: RwLock::new(None), last_failure: Mutex::new(None), stats: RoleStats::default() };
        Self { role, slot: Arc::new(slot), permits: Arc::new(Semaphore::new(capacity)), capacity, deadline, waits }
    }

    /// Number of messages sent and not yet handled.
    pub fn depth(&self) -> usize {
        self.capacity.saturating_sub(self.permits.available_permits())
    }

    pub fn stats(&self) -> &RoleStats {
        &self.slot.stats
    }

    /// Notes a wait of the role's handle.
    pub fn wait(&self, what: &str) -> Wait {
        self.waits.enter(self.role, what)
    }

    /// Sends a message and waits for the reply to `what`. All failures of ractor become this crate's errors here.
    pub async fn ask<T: Send + 'static>(&self, what: &str, message: impl FnOnce(Permit, Reply<T>) -> Msg) -> Result<T> {
        let _wait = self.wait(what);
        let late = || Error::Timeout { role: self.role, after: self.deadline };
        let died = || Error::Died { role: self.role, reason: self.slot.failure() };
        // Those before it have a deadline of their own.
        let permit = tokio::time::timeout(2 * self.deadline, self.permits.clone().acquire_owned());
        let permit = permit.await.map_err(|_| late())?.map_err(|_| died())?;
        let actor = self.slot.actor.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(died)?;
        match actor.call(|reply| message(Permit(permit), reply), Some(self.deadline)).await {
            Ok(CallResult::Success(answer)) => answer,
            Ok(CallResult::Timeout) => Err(late()),
            Ok(CallResult::SenderError) | Err(_) => Err(died()),
        }
    }

    /// Starts the role's actor under a supervisor and connects the link to it.
    pub async fn start<M: StateMachine<Message = Msg>>(
        &self,
        build: Build<M>,
        name: String,
        supervisor: ActorCell,
    ) -> Result<ActorCell> {
        let arguments = Arguments { build, slot: self.slot.clone(), role: self.role };
        let started =
            Actor::spawn_linked(Some(name), RoleActor::<M>(std::marker::PhantomData), arguments, supervisor).await;
        match started {
            Ok((actor, _)) => {
                *self.slot.actor.write().unwrap_or_else(PoisonError::into_inner) = Some(actor.clone());
                Ok(actor.get_cell())
            }
            Err(e) => {
                let reason = self.slot.failure().unwrap_or_else(|| e.to_string());
                Err(Error::Start { role: self.role, reason })
            }
        }
    }
}

/// The actor of a role: forwards messages to the state machine's thread and stops when the thread ends.
struct RoleActor<M>(std::marker::PhantomData<fn() -> M>);

struct Arguments<M: StateMachine> {
    build: Build<M>,
    slot: Arc<Slot<M::Message>>,
    role: &'static str,
}

impl<M: StateMachine> Actor for RoleActor<M> {
    type Msg = M::Message;
    type State = Thread<M::Message>;
    type Arguments = Arguments<M>;

    async fn pre_start(
        &self,
        myself: ActorRef<M::Message>,
        arguments: Arguments<M>,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let Arguments { build, slot, role } = arguments;
        let (sender, receiver) = mpsc::channel();
        let (ready, is_ready) = oneshot::channel();
        let (ended, has_ended) = oneshot::channel::<Option<String>>();
        let thread_slot = slot.clone();
        std::thread::Builder::new().name(format!("rehearsal-{role}")).spawn(move || {
            let state = match catch_unwind(AssertUnwindSafe(|| build())) {
                Ok(Ok(state)) => state,
                Ok(Err(e)) => return drop(ready.send(Err(e.to_string()))),
                Err(panic) => return drop(ready.send(Err(panic_text(&*panic)))),
            };
            if ready.send(Ok(())).is_ok() {
                let _ = ended.send(run(state, receiver, &thread_slot.stats)); // the actor may have stopped
            }
        })?;
        let remember = |slot: &Slot<M::Message>, reason: String| {
            *slot.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        };
        if let Err(reason) = is_ready.await.unwrap_or_else(|_| Err("its thread ended before it was ready".into())) {
            remember(&slot, reason.clone());
            return Err(reason.into());
        }
        let ended = tokio::spawn(async move {
            if let Ok(Some(reason)) = has_ended.await {
                remember(&slot, reason.clone());
                myself.stop(Some(reason));
            }
        });
        Ok(Thread { messages: Some(sender), ended })
    }

    async fn handle(
        &self,
        myself: ActorRef<M::Message>,
        message: M::Message,
        thread: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        if thread.messages.as_ref().is_none_or(|m| m.send(message).is_err()) {
            // The thread has ended; the caller sees that the reply was dropped.
            myself.stop(None);
        }
        Ok(())
    }

    /// Waits until the state machine is dropped, so that a stopped actor owns nothing.
    async fn post_stop(
        &self,
        _: ActorRef<M::Message>,
        thread: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        thread.messages = None;
        let _ = (&mut thread.ended).await; // an error means that there is nothing to wait for
        Ok(())
    }
}

/// Connection of the actor to the state machine's thread.
pub(crate) struct Thread<Msg> {
    messages: Option<mpsc::Sender<Msg>>,
    /// Finishes when the state machine is dropped.
    ended: tokio::task::JoinHandle<()>,
}

/// Handles messages until the actor stops. Returns the reason if the state machine panicked.
fn run<M: StateMachine>(mut state: M, messages: mpsc::Receiver<M::Message>, stats: &RoleStats) -> Option<String> {
    while let Ok(message) = messages.recv() {
        // Counted before the reply is sent, so that the caller sees the count.
        stats.messages.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| state.apply(message)));
        stats.busy_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        if let Err(panic) = result {
            return Some(panic_text(&*panic));
        }
    }
    None
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("no message"))
}

/// Implements ractor's `Message` for an enum that stays in this process, which the `cluster` feature requires.
macro_rules! local_message {
    ($name:ty) => {
        #[cfg(feature = "cluster")]
        impl ractor::Message for $name {}
    };
}
pub(crate) use local_message;

/// The load of a role, by its handle.
pub trait RoleLoad: Send + Sync {
    /// Number of messages sent and not yet handled.
    fn depth(&self) -> usize;

    /// What the role has done so far.
    fn stats(&self) -> &RoleStats;
}

/// Implements [`RoleLoad`] for a handle.
macro_rules! role_status {
    ($handle:ty) => {
        impl $crate::RoleLoad for $handle {
            fn depth(&self) -> usize {
                self.link.depth()
            }

            fn stats(&self) -> &$crate::RoleStats {
                self.link.stats()
            }
        }
    };
}
pub(crate) use role_status;
