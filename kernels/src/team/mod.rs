//! Parallel loops, on rayon's pool or on a team of workers that do not sleep between loops.
//!
//! Decoding a token of a small model takes about a hundred parallel loops of a few microseconds each, and waking a
//! sleeping thread takes longer than such a loop. Inside [`with_team`] workers spin between loops, so that starting one
//! costs about as much as moving a cache line. Outside, the same loops run on rayon's pool. The results are the same:
//! each task of a loop writes its own part of the output, whichever thread runs it.

mod workers;

use std::cell::Cell;

use rayon::prelude::*;
use workers::Team;

thread_local! {
    /// The team that this thread leads, or null.
    static LED: Cell<*const Team> = const { Cell::new(std::ptr::null()) };
}

/// Calls `work(task)` for each task in `0..tasks`, in parallel and in no particular order.
pub fn for_each(tasks: usize, work: impl Fn(usize) + Sync) {
    let work = &work;
    let team = LED.get();
    if tasks <= 1 {
        (0..tasks).for_each(work);
    } else if team.is_null() {
        (0..tasks).into_par_iter().with_max_len(1).for_each(work);
    } else {
        // The team is busy with this loop: loops inside it run on rayon's pool.
        LED.set(std::ptr::null());
        let _restore = Restore(team);
        // SAFETY: `with_team` clears `LED` before its team is dropped.
        unsafe { &*team }.run(tasks, work);
    }
}

/// Sets `LED` back when a loop ends, also by a panic.
struct Restore(*const Team);

impl Drop for Restore {
    fn drop(&mut self) {
        LED.set(self.0);
    }
}

/// Calls `work(index, chunk)` in parallel for each chunk of `size` elements of `data`; the last chunk may be shorter.
pub fn for_each_chunk<T: Send>(data: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    struct Start<T>(*mut T);
    // SAFETY: tasks access disjoint parts of a slice whose elements are `Send`.
    unsafe impl<T: Send> Sync for Start<T> {}
    impl<T> Start<T> {
        fn at(&self, offset: usize) -> *mut T {
            self.0.wrapping_add(offset)
        }
    }
    let (start, len, size) = (Start(data.as_mut_ptr()), data.len(), size.max(1));
    for_each(len.div_ceil(size), |task| {
        let (from, to) = (task * size, ((task + 1) * size).min(len));
        // SAFETY: the range is inside the slice, and no other task has it.
        work(task, unsafe { std::slice::from_raw_parts_mut(start.at(from), to - from) });
    });
}

/// The chunk at `index` of a slice that is split as by [`for_each_chunk`].
pub fn chunk<T>(data: &[T], size: usize, index: usize) -> &[T] {
    &data[index * size..((index + 1) * size).min(data.len())]
}

/// Number of items per task, at most `most`: fewer in a team, where small tasks are cheap, so that each thread gets some.
pub fn share(items: usize, most: usize) -> usize {
    let team = LED.get();
    if team.is_null() {
        return most;
    }
    // SAFETY: as in `for_each`.
    let threads = unsafe { &*team }.threads();
    items.div_ceil(threads).clamp(1, most)
}

/// Whether this thread leads a team, which runs its loops.
pub fn in_team() -> bool {
    !LED.get().is_null()
}

/// Calls `f` with a thread-local buffer that is kept between calls. A nested call gets a new buffer.
#[macro_export]
macro_rules! lend {
    ($ty:ty, $f:expr) => {{
        thread_local!(static BUFFER: std::cell::Cell<$ty> = std::cell::Cell::default());
        let mut buffer = BUFFER.take();
        let result = $f(&mut buffer);
        BUFFER.set(buffer);
        result
    }};
}
pub use lend;

/// Runs `f` on this thread as the leader of a team, with one worker for each other thread of the current rayon pool.
///
/// Parallel loops that `f` runs on this thread use the team. Does nothing else if this thread leads a team already, or if
/// the pool has one thread.
pub fn with_team<T>(f: impl FnOnce() -> T) -> T {
    let workers = rayon::current_num_threads().saturating_sub(1);
    if workers == 0 || in_team() {
        return f();
    }
    let team = Team::new(workers);
    std::thread::scope(|scope| {
        let team = &team;
        for i in 1..=workers {
            let builder = std::thread::Builder::new().name(format!("rehearsal-team-{i}"));
            // If a thread cannot be spawned, the others do its share.
            let _ = builder.spawn_scoped(scope, move || team.worker_loop(i));
        }
        let _end = End(team);
        LED.set(team);
        f()
    })
}

/// Stops a team's workers when its leader is done, also by a panic.
struct End<'a>(&'a Team);

impl Drop for End<'_> {
    fn drop(&mut self) {
        LED.set(std::ptr::null());
        self.0.stop();
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
                with_team(|| {
                    for round in 0..2000usize {
                        let mut counts = vec![0u32; round % 67];
                        for_each_chunk(&mut counts, 1 + round % 3, |_, c| c.iter_mut().for_each(|c| *c += 1));
                        assert!(counts.iter().all(|&c| c == 1), "{threads} threads, round {round}: {counts:?}");
                    }
                    // Parked workers wake up.
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
            with_team(|| {
                with_team(|| {
                    for_each(7, |i| {
                        for_each(5, |j| {
                            sum.fetch_add(i * j, Ordering::Relaxed);
                        })
                    })
                });
                assert!(in_team());
                assert_eq!(share(16, 32), 6);
            });
            assert!(!in_team());
            assert_eq!(sum.into_inner(), 210);
        });
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_team_goes_on() {
        pool(4).install(|| {
            with_team(|| {
                for round in 0..50 {
                    let run = || {
                        for_each(64, |i| {
                            if i == 60 {
                                panic!("round {round}");
                            }
                        })
                    };
                    let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
                    assert_eq!(panic.downcast_ref::<String>(), Some(&format!("round {round}")));
                    assert!(in_team());
                    for_each(3, |_| ());
                }
            });
            let ended = catch_unwind(|| with_team(|| panic!("outside a loop")));
            assert!(ended.is_err() && !in_team());
        });
    }
}
