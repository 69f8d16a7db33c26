//! All algorithms: one line for each.

use std::any::Any;
use std::sync::Arc;

use super::dpo::Dpo;
use super::iterative_dpo::IterativeDpo;
use super::online_dpo::OnlineDpo;
use super::ppo::Ppo;
use super::reward_model::RewardModel;
use super::rso::Rso;
use super::sft::Sft;
use crate::driver::AlgorithmSettings;
use crate::metrics::{self, Metric};

/// An algorithm by its name in configurations.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Value of `job.algorithm`.
    pub name: &'static str,
    /// Its default settings.
    pub settings: fn() -> Box<dyn AlgorithmSettings>,
}

/// Every algorithm; the first is the default.
pub const ALGORITHMS: &[Entry] = &[
    Entry { name: "online_dpo", settings: || Box::new(OnlineDpo::default()) },
    Entry { name: "sft", settings: || Box::new(Sft::default()) },
    Entry { name: "reward_model", settings: || Box::new(RewardModel::default()) },
    Entry { name: "dpo", settings: || Box::new(Dpo::default()) },
    Entry { name: "ppo", settings: || Box::new(Ppo::default()) },
    Entry { name: "iterative_dpo", settings: || Box::new(IterativeDpo::default()) },
    Entry { name: "rso", settings: || Box::new(Rso::default()) },
];

/// The algorithms that configurations may name: those of this crate, and the program's own.
///
/// ```
/// use rehearsal::algorithms::{Algorithms, Sft};
///
/// // A program's own algorithm would have settings of its own here.
/// let algorithms = Algorithms::default().with("my_sft", || Box::new(Sft::default()));
/// let config = algorithms.config("my_sft", "runs/mine").unwrap();
/// assert_eq!(config.algorithm_name(), "my_sft");
/// ```
#[derive(Debug, Clone)]
pub struct Algorithms(Arc<[Entry]>);

impl Default for Algorithms {
    fn default() -> Self {
        Self(ALGORITHMS.into())
    }
}

impl Algorithms {
    /// Adds an algorithm by its name in `job.algorithm` and its default settings, in place of one with the same name.
    pub fn with(self, name: &'static str, settings: fn() -> Box<dyn AlgorithmSettings>) -> Self {
        let others = self.0.iter().filter(|entry| entry.name != name).copied();
        Self(others.chain([Entry { name, settings }]).collect())
    }

    /// All of them; the first is the default.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// An algorithm by its name.
    pub fn named(&self, name: &str) -> Option<Entry> {
        self.0.iter().find(|entry| entry.name == name).copied()
    }

    /// The algorithm whose settings have the type of `settings`.
    pub fn of(&self, settings: &dyn AlgorithmSettings) -> Option<Entry> {
        let id = |settings: &dyn AlgorithmSettings| (settings as &dyn Any).type_id();
        self.0.iter().find(|entry| id(&*(entry.settings)()) == id(settings)).copied()
    }

    /// Every metric: those that every job has, then those that single algorithms declare.
    pub fn metrics(&self) -> Vec<&'static Metric> {
        let own = self.0.iter().flat_map(|entry| (entry.settings)().metrics());
        metrics::shared().chain(own).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_metrics_are_unique() {
        let mut seen = std::collections::BTreeSet::new();
        assert!(Algorithms::default().metrics().iter().all(|m| seen.insert(m.name)), "a metric is declared twice");
        assert!(seen.len() > 60);
    }
}
