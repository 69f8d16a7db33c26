//! Tests of roles and their handles, on a role that counts.

mod custom_objective;

pub use custom_objective::tiny_model;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::role::{Build, Link, Permit, Reply, StateMachine, answer, local_message};
use crate::{BufferHandle, Director, DirectorEvent, Error, Result, RoleStatus, Waits};

enum CountMsg {
    Add { n: u64, _permit: Permit, reply: Reply<u64> },
    Wait { open: Arc<AtomicBool>, _permit: Permit, reply: Reply<()> },
    Panic { _permit: Permit, reply: Reply<()> },
}
local_message!(CountMsg);

struct Count(u64);

impl StateMachine for Count {
    type Message = CountMsg;

    fn apply(&mut self, message: CountMsg) {
        match message {
            CountMsg::Add { n: 0, reply, .. } => answer(reply, Err(Error::Checkpoint("nothing to add".into()))),
            CountMsg::Add { n, reply, .. } => {
                self.0 += n;
                answer(reply, Ok(self.0));
            }
            CountMsg::Wait { open, reply, .. } => {
                let give_up = Instant::now() + LONG;
                while !open.load(Ordering::SeqCst) && Instant::now() < give_up {
                    std::thread::sleep(Duration::from_millis(1));
                }
                answer(reply, Ok(()));
            }
            CountMsg::Panic { reply, .. } => {
                drop(reply);
                panic!("the counter failed");
            }
        }
    }
}

struct Fixture {
    director: Director,
    link: Link<CountMsg>,
    events: mpsc::UnboundedReceiver<DirectorEvent>,
    builds: Arc<AtomicUsize>,
}

impl Fixture {
    async fn new(capacity: usize, deadline: Duration, restarts_max: u32) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let director = Director::start(restarts_max, deadline, sender).await.unwrap();
        let link = Link::new("count", capacity, deadline, Waits::default());
        let builds = Arc::new(AtomicUsize::new(0));
        let build: Build<Count> = {
            let builds = builds.clone();
            Arc::new(move || {
                builds.fetch_add(1, Ordering::SeqCst);
                Ok(Count(0))
            })
        };
        director.spawn(&link, build, "count").await.unwrap();
        Self { director, link, events, builds }
    }

    async fn add(&self, n: u64) -> Result<u64> {
        self.link.ask("add", |_permit, reply| CountMsg::Add { n, _permit, reply }).await
    }

    /// Keeps the role busy until `open` is set.
    async fn wait(&self, open: Arc<AtomicBool>) -> Result<()> {
        self.link.ask("wait", |_permit, reply| CountMsg::Wait { open, _permit, reply }).await
    }

    /// Waits until no message holds a permit. A reply may arrive before the permit of its message is given back.
    async fn until_idle(&self) {
        tokio::time::timeout(LONG, async {
            while self.link.depth() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("the mailbox empties");
    }

    async fn panic(&self) -> Result<()> {
        self.link.ask("panic", |_permit, reply| CountMsg::Panic { _permit, reply }).await
    }
}

const LONG: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_refused_request_is_an_error_reply_and_the_role_keeps_running() {
    let f = Fixture::new(4, LONG, 0).await;
    assert!(f.add(0).await.unwrap_err().to_string().contains("nothing to add"));
    assert_eq!(f.add(2).await.unwrap(), 2);
    assert_eq!(f.add(3).await.unwrap(), 5);
    assert_eq!(f.link.stats().messages(), 3);
}

#[tokio::test]
async fn a_role_that_panics_is_restarted_up_to_its_limit() {
    let mut f = Fixture::new(4, LONG, 1).await;
    f.add(7).await.unwrap();
    let error = f.panic().await.unwrap_err();
    assert!(error.is_death(), "{error}");
    f.director.wait_for_restarts(1).await.unwrap();
    assert_eq!(f.add(1).await.unwrap(), 1, "the restarted role has a new state");
    assert_eq!(f.builds.load(Ordering::SeqCst), 2);
    let event = f.events.recv().await.unwrap();
    assert!(
        matches!(&event, DirectorEvent::Restarted { role: "count", reason, restarts: 1 } if reason.contains("the counter failed")),
        "{event:?}"
    );

    f.panic().await.unwrap_err();
    f.director.wait_for_restarts(2).await.unwrap();
    assert!(matches!(f.director.status()["count"], RoleStatus::GaveUp { restarts: 2, .. }));
    let failure = f.director.failure().unwrap().to_string();
    assert!(failure.contains("stopped 2 times") && failure.contains("the counter failed"), "{failure}");
}

#[tokio::test]
async fn a_mailbox_is_bounded_and_a_slow_role_is_a_timeout() {
    let f = Arc::new(Fixture::new(2, Duration::from_secs(2), 0).await);
    let open = Arc::new(AtomicBool::new(false));
    let mut inside: Vec<_> = (0..4)
        .map(|_| {
            let (f, open) = (f.clone(), open.clone());
            tokio::spawn(async move { f.wait(open).await })
        })
        .collect();
    while f.link.depth() < 2 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(f.link.depth(), 2, "the other two wait for a permit");
    let outside = inside.split_off(2);
    for task in inside {
        assert!(matches!(task.await.unwrap(), Err(Error::Timeout { role: "count", .. })));
    }
    // A timeout does not cancel the work; once it is done the role answers again.
    open.store(true, Ordering::SeqCst);
    for task in outside {
        task.await.unwrap().unwrap();
    }
    f.until_idle().await;
    assert_eq!(f.add(1).await.unwrap(), 1);
    f.until_idle().await;
}

#[tokio::test]
async fn a_busy_role_does_not_block_the_async_threads() {
    let f = Arc::new(Fixture::new(4, 2 * LONG, 0).await); // a runtime of one thread
    let open = Arc::new(AtomicBool::new(false));
    let busy = {
        let (f, open) = (f.clone(), open.clone());
        tokio::spawn(async move { f.wait(open).await })
    };
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(!busy.is_finished(), "nothing else ran until the role was done");
    open.store(true, Ordering::SeqCst);
    busy.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_role_that_cannot_start_says_why() {
    let (sender, _events) = mpsc::unbounded_channel();
    let director = Director::start(0, LONG, sender).await.unwrap();
    let link: Link<CountMsg> = Link::new("count", 1, LONG, Waits::default());
    let build: Build<Count> = Arc::new(|| Err(Error::Checkpoint("no such device".into())));
    let error = director.spawn(&link, build, "count").await.unwrap_err().to_string();
    assert!(error.contains("no such device"), "{error}");
}

#[tokio::test]
async fn two_jobs_run_side_by_side() {
    let (sender, _events) = mpsc::unbounded_channel();
    let one = Director::start(0, LONG, sender.clone()).await.unwrap();
    let two = Director::start(0, LONG, sender).await.unwrap();
    let a: BufferHandle = one.buffer(1, 10, 0).await.unwrap();
    let b: BufferHandle = two.buffer(1, 10, 0).await.unwrap();
    a.clear().await.unwrap();
    one.stop().await;
    assert!(a.clear().await.unwrap_err().is_death());
    b.clear().await.unwrap();
}

#[tokio::test]
async fn a_stopped_job_has_released_its_store() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..10 {
        let (sender, _events) = mpsc::unbounded_channel();
        let director = Director::start(0, LONG, sender).await.unwrap();
        let (store, _) = rehearsal_store::Store::open(folder.path()).unwrap();
        let archivist = director.archivist(store, Arc::new(|_| {})).await.unwrap();
        archivist.replay(0).await.unwrap();
        director.stop().await;
    }
}
