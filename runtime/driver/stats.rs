//! Numbers of a step.

use std::collections::BTreeMap;

use rehearsal_actors::{StepReport, StepTimes};

use crate::summary::{Seconds, StepSummary};

/// Numbers of a step by the names of their metrics.
pub type Stats = BTreeMap<&'static str, f64>;

/// What an algorithm returns of a step.
pub struct Step {
    /// The driver fills in `step` and `seconds.total`.
    pub summary: StepSummary,
    /// Prompts or rows that were drawn.
    pub drawn: usize,
    /// Completions that were generated.
    pub completions: usize,
}

/// The mean, or 0 of nothing.
pub fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), x| (sum + x, n + 1));
    if n == 0 { 0.0 } else { sum / f64::from(n) }
}

/// The value that a share `q` (0 to 1) of ascending values do not exceed: the nearest rank, which is one of the values; 0 of
/// nothing.
pub fn quantile(ascending: &[f64], q: f64) -> f64 {
    let rank = (q * ascending.len() as f64).ceil() as usize;
    ascending.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// The updates of a step: the last one's loss and gradient norm, and the means of their statistics.
#[derive(Default)]
pub struct Updates {
    reports: Vec<StepReport>,
}

impl Updates {
    /// One update.
    pub fn one(report: StepReport) -> Self {
        Self { reports: vec![report] }
    }

    /// Adds an update.
    pub fn add(&mut self, report: StepReport) {
        self.reports.push(report);
    }

    /// The mean of each statistic over the updates.
    pub fn stats(&self) -> Stats {
        let mut sums: BTreeMap<&'static str, (f64, f64)> = BTreeMap::new();
        for (name, value) in self.reports.iter().flat_map(|r| &r.stats) {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + value, sum.1 + 1.0);
        }
        sums.into_iter().map(|(name, (sum, n))| (name, sum / n)).collect()
    }

    /// How many there were.
    pub fn count(&self) -> usize {
        self.reports.len()
    }

    /// Loss of the last update; 0 where there was none.
    pub fn loss(&self) -> f64 {
        self.reports.last().map_or(0.0, |r| r.loss)
    }

    /// Seconds that all of them took.
    pub fn seconds(&self) -> f64 {
        self.times().total().as_secs_f64()
    }

    fn times(&self) -> StepTimes {
        let mut times = StepTimes::default();
        self.reports.iter().for_each(|r| times.add(&r.times));
        times
    }

    /// The summary of a step that had these updates. A statistic of the updates takes the place of one in `stats` that
    /// has its name. `version` is the model's where there was no update.
    pub fn summary(&self, mut stats: Stats, seconds: Seconds, learning_rate: f64, version: u64) -> StepSummary {
        let (last, times) = (self.reports.last(), self.times());
        stats.extend(self.stats());
        StepSummary {
            step: 0,
            version: last.map_or(version, |r| r.version),
            loss: self.loss(),
            gradient_norm: last.map_or(0.0, |r| r.grad_norm),
            learning_rate,
            generated_tokens: 0,
            trained_tokens: self.reports.iter().map(|r| r.tokens).sum(),
            stats,
            seconds: Seconds {
                forward: times.forward.as_secs_f64(),
                backward: times.backward.as_secs_f64(),
                optimizer: times.optimizer.as_secs_f64(),
                ..seconds
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_value_of_the_nearest_rank() {
        let ten: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!([0.0, 0.1, 0.11, 0.5, 0.9, 1.0].map(|q| quantile(&ten, q)), [1.0, 1.0, 2.0, 5.0, 9.0, 10.0]);
        assert_eq!((quantile(&[7.0], 0.5), quantile(&[], 0.5)), (7.0, 0.0));
    }
}
