//! All algorithms: one line for each.

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
#[derive(Debug)]
pub struct Entry {
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

/// Every metric: those that every job has, then those that single algorithms declare.
pub fn metrics() -> Vec<&'static Metric> {
    let own = ALGORITHMS.iter().flat_map(|entry| (entry.settings)().metrics());
    metrics::shared().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_metrics_are_unique() {
        let mut seen = std::collections::BTreeSet::new();
        assert!(metrics().iter().all(|m| seen.insert(m.name)), "a metric is declared twice");
        assert!(seen.len() > 60);
    }
}
