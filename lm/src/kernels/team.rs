//! Parallel loops, and threads that stay awake between them.
//!
//! A token of a small model is some hundred parallel loops of a few microseconds each, and waking a sleeping worker takes longer
//! than such a loop. Inside [`awake`] helpers wait for the next loop without sleeping, so that handing one out costs about as much
//! as moving a cache line. Outside of it the same loops run on rayon's pool. Results are the same: a loop's tasks own what they
//! write, and nothing depends on who runs them.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;

/// How long a helper waits for a loop at full speed, and then how long it lets others run between looks, before it sleeps.
const SPIN: Duration = Duration::from_micros(30);
const YIELD: Duration = Duration::from_micros(300);

thread_local! {
    /// The team this thread leads.
    static LED: Cell<*const Team> = const { Cell::new(std::ptr::null()) };
}

/// Calls `work` for every task below `tasks`, in any order, on all threads.
pub fn for_each(tasks: usize, work: impl Fn(usize) + Sync) {
    let work = &work;
    let team = LED.get();
    if tasks <= 1 {
        (0..tasks).for_each(work);
    } else if team.is_null() {
        (0..tasks).into_par_iter().with_max_len(1).for_each(work);
    } else {
        // A loop inside this one is not for the team, which is taken.
        LED.set(std::ptr::null());
        let _back = Restore(team);
        // SAFETY: `awake` keeps its team until it has cleared `LED`.
        unsafe { &*team }.run(tasks, work);
    }
}

/// Gives a thread its team back, however a loop ends.
struct Restore(*const Team);

impl Drop for Restore {
    fn drop(&mut self) {
        LED.set(self.0);
    }
}

/// [`for_each`] over chunks of `size` elements, the last maybe shorter, with the index of each.
pub fn for_each_chunk<T: Send>(data: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    struct Start<T>(*mut T);
    // SAFETY: tasks take disjoint parts of a slice whose elements may go to other threads.
    unsafe impl<T: Send> Sync for Start<T> {}
    impl<T> Start<T> {
        fn at(&self, offset: usize) -> *mut T {
            self.0.wrapping_add(offset)
        }
    }
    let (start, len, size) = (Start(data.as_mut_ptr()), data.len(), size.max(1));
    for_each(len.div_ceil(size), |task| {
        let (from, to) = (task * size, ((task + 1) * size).min(len));
        // SAFETY: inside the slice, and every task has its own part.
        work(task, unsafe { std::slice::from_raw_parts_mut(start.at(from), to - from) });
    });
}

/// The chunk that [`for_each_chunk`] has beside its own in a slice split alike.
pub fn chunk<T>(data: &[T], size: usize, index: usize) -> &[T] {
    &data[index * size..((index + 1) * size).min(data.len())]
}

/// Items for a task where `most` are plenty: fewer if they would not go round an awake team, which can share small work.
pub fn share(items: usize, most: usize) -> usize {
    let team = LED.get();
    if team.is_null() {
        return most;
    }
    // SAFETY: as in `for_each`.
    let threads = unsafe { &*team }.next.len();
    items.div_ceil(threads).clamp(1, most)
}

/// Whether loops on this thread are handed to helpers that are awake.
pub fn is_awake() -> bool {
    !LED.get().is_null()
}

/// Lends `f` a buffer of the thread's own, kept between calls; a call inside a call gets a fresh one.
macro_rules! lend {
    ($ty:ty, $f:expr) => {{
        thread_local!(static BUFFER: std::cell::Cell<$ty> = std::cell::Cell::default());
        let mut buffer = BUFFER.take();
        let result = $f(&mut buffer);
        BUFFER.set(buffer);
        result
    }};
}
pub(crate) use lend;

/// Runs `f` on this thread, with as many helpers as the current rayon pool has other threads.
pub fn awake<T>(f: impl FnOnce() -> T) -> T {
    let helpers = rayon::current_num_threads().saturating_sub(1);
    if helpers == 0 || is_awake() {
        return f();
    }
    let team = Team::new(helpers);
    std::thread::scope(|scope| {
        let team = &team;
        for i in 1..=helpers {
            let builder = std::thread::Builder::new().name(format!("rehearsal-team-{i}"));
            // Without a thread the others do its work.
            let _ = builder.spawn_scoped(scope, move || team.help(i));
        }
        let _end = End(team);
        LED.set(team);
        f()
    })
}

/// Dismisses a team, however its work ends.
struct End<'a>(&'a Team);

impl Drop for End<'_> {
    fn drop(&mut self) {
        LED.set(std::ptr::null());
        self.0.over.store(true, Ordering::SeqCst);
        self.0.wake();
    }
}

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

struct Team {
    state: Apart<AtomicU64>,
    /// The next task of each thread's share, the leader's first. Shares are neighbours in memory as a rule, so a thread goes
    /// through its own from front to back before it helps with another's.
    next: Vec<Apart<AtomicUsize>>,
    /// Written by the leader while the step is closed and nobody is inside; read by those who are inside.
    step: UnsafeCell<Step>,
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
    fn new(helpers: usize) -> Self {
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
    fn run(&self, tasks: usize, work: &(impl Fn(usize) + Sync)) {
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
        let threads = self.next.len();
        thread * tasks / threads..(thread + 1) * tasks / threads
    }

    /// Takes tasks until there are none, a thread's own ones first. A panic is kept for the leader; others finish the step.
    fn work(&self, thread: usize, step: Step) {
        // SAFETY: the caller is inside the step.
        let work = unsafe { &*step.work };
        let threads = self.next.len();
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

    /// A helper's life.
    fn help(&self, thread: usize) {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_task_runs_once_however_many_threads_and_loops_there_are() {
        for threads in [1, 2, 5] {
            pool(threads).install(|| {
                awake(|| {
                    for round in 0..2000usize {
                        let mut counts = vec![0u32; round % 67];
                        for_each_chunk(&mut counts, 1 + round % 3, |_, c| c.iter_mut().for_each(|c| *c += 1));
                        assert!(counts.iter().all(|&c| c == 1), "{threads} threads, round {round}: {counts:?}");
                    }
                    // Helpers that fell asleep come back.
                    std::thread::sleep(Duration::from_millis(5));
                    let sum = AtomicUsize::new(0);
                    for_each(100, |i| {
                        sum.fetch_add(i, Ordering::Relaxed);
                    });
                    assert_eq!(sum.into_inner(), 4950);
                });
            });
        }
    }

    #[test]
    fn loops_may_be_nested_and_teams_too() {
        pool(3).install(|| {
            let sum = AtomicUsize::new(0);
            awake(|| {
                awake(|| {
                    for_each(7, |i| {
                        for_each(5, |j| {
                            sum.fetch_add(i * j, Ordering::Relaxed);
                        })
                    })
                });
                assert!(is_awake());
                assert_eq!(share(16, 32), 6);
            });
            assert!(!is_awake());
            assert_eq!(sum.into_inner(), 210);
        });
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_team_goes_on() {
        pool(4).install(|| {
            awake(|| {
                for round in 0..50 {
                    let run = || {
                        for_each(64, |i| {
                            if i == 60 {
                                panic!("round {round}");
                            }
                        })
                    };
                    let said = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
                    assert_eq!(said.downcast_ref::<String>(), Some(&format!("round {round}")));
                    assert!(is_awake());
                    for_each(3, |_| ());
                }
            });
            let ended = catch_unwind(|| awake(|| panic!("outside a loop")));
            assert!(ended.is_err() && !is_awake());
        });
    }
}
