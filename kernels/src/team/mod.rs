//! Parallel loops, and threads that stay awake between them.
//!
//! A token of a small model is some hundred parallel loops of a few microseconds each, and waking a sleeping worker takes longer
//! than such a loop. Inside [`awake`] helpers wait for the next loop without sleeping, so that handing one out costs about as much
//! as moving a cache line. Outside of it the same loops run on rayon's pool. Results are the same: a loop's tasks own what they
//! write, and nothing depends on who runs them.

mod crew;

use std::cell::Cell;

use crew::Team;
use rayon::prelude::*;

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
    let threads = unsafe { &*team }.threads();
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
        self.0.dismiss();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

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
