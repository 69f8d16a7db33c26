//! A leader and helpers that wait for its loops without sleeping.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper waits for a loop at full speed, and then how long it lets others run between looks, before it sleeps.
const SPIN: Duration = Duration::from_micros(30);
const YIELD: Duration = Duration::from_micros(300);

/// Keeps what two threads write apart: a line of the cache, and the one fetched with it.
#[repr(align(128))]
struct Apart<T>(T);

type Work = dyn Fn(usize) + Sync;

/// The loop that is being worked on.
#[derive(Clone, Copy)]
struct Step {
    tasks: usize,
    work: *const Work,
}

/// [`Team::state`]: helpers inside the step, whether more may enter, and the step's number.
const INSIDE: u64 = 0xffff;
const OPEN: u64 = 0x1_0000;
const NUMBER: u64 = 0x2_0000;

pub struct Team {
    state: Apart<AtomicU64>,
    /// The next task of each thread's share, the leader's first. Shares are neighbours in memory as a rule, so a thread goes
    /// through its own from front to back before it helps with another's.
    next: Vec<Apart<AtomicUsize>>,
    /// Written by the leader while the step is closed and nobody is inside; read by those who are inside.
    step: UnsafeCell<Step>,
    /// Whether helpers may go.
    over: AtomicBool,
    asleep: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `step` is read and written as its documentation says; the work it points to is `Sync`, and is called only by those
// inside a step, for whose end the leader waits before the work's borrow ends.
unsafe impl Sync for Team {}

impl Team {
    pub fn new(helpers: usize) -> Self {
        fn nothing(_: usize) {}
        let work: &'static Work = &nothing;
        Self {
            state: Apart(AtomicU64::new(0)),
            next: (0..=helpers).map(|_| Apart(AtomicUsize::new(0))).collect(),
            step: UnsafeCell::new(Step { tasks: 0, work }),
            over: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            bed: Mutex::default(),
            bell: Condvar::new(),
            panic: Mutex::default(),
        }
    }

    /// The leader's part: opens a step, works on it, closes it, and waits for those inside. Who has not entered by then is not
    /// waited for.
    pub fn run(&self, tasks: usize, work: &(impl Fn(usize) + Sync)) {
        let work: *const (dyn Fn(usize) + Sync + '_) = work;
        // SAFETY: only the lifetime changes, and nobody calls it once this function has returned.
        let work = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Work>(work) };
        // SAFETY: the last step was closed and left.
        unsafe { *self.step.get() = Step { tasks, work } };
        for (share, next) in self.next.iter().enumerate() {
            next.0.store(self.share(share, tasks).start, Ordering::Relaxed);
        }
        let last = self.state.0.load(Ordering::Relaxed);
        self.state.0.store((last & !(OPEN | INSIDE)) + NUMBER + OPEN, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        self.work(0, Step { tasks, work });
        self.state.0.fetch_and(!OPEN, Ordering::AcqRel);
        let mut patience = Patience::default();
        while self.state.0.load(Ordering::Acquire) & INSIDE != 0 {
            patience.wait();
        }
        if let Some(panic) = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }

    /// Tasks that are a thread's own.
    fn share(&self, thread: usize, tasks: usize) -> Range<usize> {
        let threads = self.threads();
        thread * tasks / threads..(thread + 1) * tasks / threads
    }

    /// Takes tasks until there are none, a thread's own ones first. A panic is kept for the leader; others finish the step.
    fn work(&self, thread: usize, step: Step) {
        // SAFETY: the caller is inside the step.
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

    /// Threads, the leader among them.
    pub fn threads(&self) -> usize {
        self.next.len()
    }

    /// Sends the helpers away.
    pub fn dismiss(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// A helper's life.
    pub fn help(&self, thread: usize) {
        let mut done = 0;
        let mut patience = Patience::default();
        while !self.over.load(Ordering::Acquire) {
            let state = self.state.0.load(Ordering::Acquire);
            let number = state / NUMBER;
            if state & OPEN == 0 || number == done {
                if !patience.wait() {
                    self.sleep(state);
                    patience = Patience::default();
                }
                continue;
            }
            if self.state.0.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                done = number;
                // SAFETY: inside, so the leader does not write it.
                self.work(thread, unsafe { *self.step.get() });
                self.state.0.fetch_sub(1, Ordering::Release);
                patience = Patience::default();
            }
        }
    }

    /// Until the state is another than `seen`, or the team's work is over.
    fn sleep(&self, seen: u64) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        // Other helpers coming and going change the state too, which costs a look.
        while self.state.0.load(Ordering::SeqCst) == seen && !self.over.load(Ordering::SeqCst) {
            bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn wake(&self) {
        let _bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.bell.notify_all();
    }
}

/// Waiting that begins fast and ends asleep.
#[derive(Default)]
struct Patience {
    looks: u32,
    since: Option<Instant>,
}

impl Patience {
    /// Waits a moment; false once it is time to sleep.
    fn wait(&mut self) -> bool {
        // The clock is read now and then: it takes longer than a look.
        const LOOKS: u32 = 32;
        self.looks += 1;
        if !self.looks.is_multiple_of(LOOKS) {
            std::hint::spin_loop();
            return true;
        }
        let waited = self.since.get_or_insert_with(Instant::now).elapsed();
        if waited > SPIN {
            // From here on every look lets others run.
            self.looks = LOOKS - 1;
            std::thread::yield_now();
        }
        waited < YIELD
    }
}
