//! What a job waits for, by name, and since when.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The waits of a job. Clones are the same ones.
#[derive(Clone, Default)]
pub struct Waits(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    next: u64,
    current: BTreeMap<u64, (WaitName, Instant)>,
}

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WaitName {
    /// Who is waited for: a role, a device, the files of the job.
    pub whom: &'static str,
    /// For what.
    pub what: String,
}

impl std::fmt::Display for WaitName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.whom, self.what)
    }
}

impl Waits {
    /// Notes a wait, which lasts until the value is dropped.
    pub fn enter(&self, whom: &'static str, what: impl Into<String>) -> Wait {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.current.insert(number, (WaitName { whom, what: what.into() }, Instant::now()));
        Wait { waits: self.clone(), number }
    }

    /// What is waited for now, with the time since the oldest wait for it began.
    pub fn current(&self) -> BTreeMap<WaitName, Duration> {
        let mut names = BTreeMap::new();
        // In the order in which they began: the first of a name is its oldest.
        for (name, since) in self.state().current.values() {
            names.entry(name.clone()).or_insert_with(|| since.elapsed());
        }
        names
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A wait that is going on.
pub struct Wait {
    waits: Waits,
    number: u64,
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.waits.state().current.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_wait_of_each_name_counts() {
        let waits = Waits::default();
        let first = waits.enter("reward", "score by words");
        std::thread::sleep(Duration::from_millis(5));
        let second = waits.enter("reward", "score by words");
        let other = waits.enter("policy", "generate");
        let current = waits.current();
        assert_eq!(current.len(), 2);
        let name = WaitName { whom: "reward", what: "score by words".into() };
        assert!(current[&name] >= Duration::from_millis(5));
        drop((first, other));
        assert_eq!(waits.current().into_keys().collect::<Vec<_>>(), [name]);
        drop(second);
        assert!(waits.current().is_empty());
    }
}
