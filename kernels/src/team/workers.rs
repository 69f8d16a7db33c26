//! A leader thread and workers that spin between its parallel loops.
//!
//! A loop is a *step*: the leader opens it, workers enter it and take tasks, the leader closes it and waits for those
//! inside. Idle workers spin, then yield, then park.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long an idle worker spins before it yields between polls.
const SPIN: Duration = Duration::from_micros(30);
/// How long a worker is idle before it parks.
const YIELD: Duration = Duration::from_micros(300);

/// Aligned so that two threads do not write to the same cache line, nor to the line prefetched with it.
#[repr(align(128))]
struct Apart<T>(T);

type Work = dyn Fn(usize) + Sync;

/// A parallel loop.
#[derive(Clone, Copy)]
struct Step {
    tasks: usize,
    work: *const Work,
}

/// Fields of [`Team::state`]: the number of workers inside the step.
const INSIDE: u64 = 0xffff;
/// Whether workers may enter the step.
const OPEN: u64 = 0x1_0000;
/// One step; the bits from here up count the steps.
const NUMBER: u64 = 0x2_0000;

/// The state that a leader shares with its workers.
pub struct Team {
    state: Apart<AtomicU64>,
    /// The next task of each thread's share; the leader's share is the first. Tasks next to each other mostly work on
    /// neighbouring memory, so a thread finishes its own share from front to back before it takes tasks of another's.
    next: Vec<Apart<AtomicUsize>>,
    /// Written by the leader while the step is closed and no worker is inside; read by workers inside.
    step: UnsafeCell<Step>,
    /// Whether workers should exit.
    stopped: AtomicBool,
    /// Number of workers that are parked, or about to park.
    parked: AtomicUsize,
    park_lock: Mutex<()>,
    wake: Condvar,
    /// The panic of a task of the current step.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `step` is accessed as its documentation says. The closure it points to is `Sync` and is called only by threads
// inside the step, which the leader waits for before the closure's borrow ends.
unsafe impl Sync for Team {}

impl Team {
    /// A team of a leader and so many workers, which the caller spawns.
    pub fn new(workers: usize) -> Self {
        fn nothing(_: usize) {}
        let work: &'static Work = &nothing;
        Self {
            state: Apart(AtomicU64::new(0)),
            next: (0..=workers).map(|_| Apart(AtomicUsize::new(0))).collect(),
            step: UnsafeCell::new(Step { tasks: 0, work }),
            stopped: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            park_lock: Mutex::default(),
            wake: Condvar::new(),
            panic: Mutex::default(),
        }
    }

    /// Runs a loop, as the leader: opens a step, takes part in it, closes it, and waits for the workers inside. Workers that
    /// have not entered by then are not waited for. A panic of a task is resumed here.
    pub fn run(&self, tasks: usize, work: &(impl Fn(usize) + Sync)) {
        let work: *const (dyn Fn(usize) + Sync + '_) = work;
        // SAFETY: only the lifetime changes, and the closure is not called after this function has returned.
        let work = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Work>(work) };
        // SAFETY: the last step is closed and no worker is inside.
        unsafe { *self.step.get() = Step { tasks, work } };
        for (share, next) in self.next.iter().enumerate() {
            next.0.store(self.share(share, tasks).start, Ordering::Relaxed);
        }
        let last = self.state.0.load(Ordering::Relaxed);
        self.state.0.store((last & !(OPEN | INSIDE)) + NUMBER + OPEN, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) > 0 {
            self.wake_workers();
        }
        self.work(0, Step { tasks, work });
        self.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut idle = Idle::default();
        while self.state.0.load(Ordering::Acquire) & INSIDE != 0 {
            idle.wait();
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// The range of tasks that a thread starts with.
    fn share(&self, thread: usize, tasks: usize) -> Range<usize> {
        let threads = self.threads();
        thread * tasks / threads..(thread + 1) * tasks / threads
    }

    /// Takes tasks until none are left, those of the thread's own share first. A panic is stored for the leader; the other
    /// threads finish the step.
    fn work(&self, thread: usize, step: Step) {
        // SAFETY: the caller is inside the step, so the closure is alive.
        let work = unsafe { &*step.work };
        let threads = self.threads();
        let all = || {
            for share in (thread..threads).chain(0..thread) {
                let end = self.share(share, step.tasks).end;
                loop {
                    let task = self.next[share].0.fetch_add(1, Ordering::Relaxed);
                    if task >= end {
                        break;
                    }
                    work(task);
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(all)) {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
    }

    /// Number of threads, including the leader.
    pub fn threads(&self) -> usize {
        self.next.len()
    }

    /// Makes the workers exit.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wake_workers();
    }

    /// Worker loop: runs open steps; between them spins, yields, then parks. Returns once the team is stopped.
    pub fn worker_loop(&self, thread: usize) {
        let mut done = 0;
        let mut idle = Idle::default();
        while !self.stopped.load(Ordering::Acquire) {
            let state = self.state.0.load(Ordering::Acquire);
            let number = state / NUMBER;
            if state & OPEN == 0 || number == done {
                if !idle.wait() {
                    self.park(state);
                    idle = Idle::default();
                }
                continue;
            }
            if self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                done = number;
                // SAFETY: this worker is inside the step, so the leader does not write it.
                self.work(thread, unsafe { *self.step.get() });
                self.state.0.fetch_sub(1, Ordering::Release);
                idle = Idle::default();
            }
        }
    }

    /// Parks the calling worker until the state differs from `seen` or the team is stopped.
    fn park(&self, seen: u64) {
        let mut guard = self.park_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.parked.fetch_add(1, Ordering::SeqCst);
        // Other workers that enter or leave a step change the state too: this worker then polls once more.
        while self.state.0.load(Ordering::SeqCst) == seen && !self.stopped.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake_workers(&self) {
        let _guard = self.park_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.wake.notify_all();
    }
}

/// How long a thread has been idle, and whether it spins or yields.
#[derive(Default)]
struct Idle {
    polls: u32,
    since: Option<Instant>,
}

impl Idle {
    /// Waits a moment between two polls; false once the thread should park.
    fn wait(&mut self) -> bool {
        // Reading the clock takes longer than a poll, so it is read only every so many polls.
        const POLLS: u32 = 32;
        self.polls += 1;
        if !self.polls.is_multiple_of(POLLS) {
            std::hint::spin_loop();
            return true;
        }
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited > SPIN {
            // From here on the thread yields after every poll.
            self.polls = POLLS - 1;
            std::thread::yield_now();
        }
        waited < YIELD
    }
}
