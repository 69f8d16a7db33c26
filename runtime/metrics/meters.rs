//! Handles to every metric on a recorder.

use std::collections::BTreeMap;

use metrics::{Counter, Gauge, Histogram, Label, NoopRecorder, Recorder, Unit};

use super::table::{MEAN, WITH_STATISTICS, counters, process, updates};
use super::{Kind, Metric};
use crate::summary::{Counters, Evaluation, StepSummary};

/// Upper bounds of the histograms' buckets, in seconds.
pub const SECONDS_BUCKETS: &[f64] = &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];

/// A statistic of a step or an evaluation has no declared metric.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the statistic `{name}` has no metric; declare a gauge `{name}` in the METRICS of the algorithm that reports it"
)]
pub struct Undeclared {
    /// The metric's name, without the prefix `rehearsal_`.
    pub name: String,
}

enum Handle {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

/// A handle to every series of every metric, by the metric's name, then by the label's value (empty without a label).
pub(crate) struct Meters(BTreeMap<&'static str, BTreeMap<&'static str, Handle>>);

impl Meters {
    /// Describes and registers metrics on a recorder; without one, what is recorded is dropped. `job` is the value of the
    /// label `job` of every series; without one there is no such label.
    pub fn new(
        recorder: Option<&(dyn Recorder + Send + Sync)>,
        declared: &[&'static Metric],
        job: Option<&str>,
    ) -> Self {
        match recorder {
            Some(recorder) => metrics::with_local_recorder(recorder, || Self::register(declared, job)),
            None => metrics::with_local_recorder(&NoopRecorder, || Self::register(declared, job)),
        }
    }

    fn register(declared: &[&'static Metric], job: Option<&str>) -> Self {
        let mut handles: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for metric in declared {
            let name = metric.exported_name();
            let unit = if metric.unit == "seconds" { Unit::Seconds } else { Unit::Count };
            match metric.kind {
                Kind::Counter => metrics::describe_counter!(name.clone(), unit, metric.help),
                Kind::Gauge => metrics::describe_gauge!(name.clone(), unit, metric.help),
                Kind::Histogram => metrics::describe_histogram!(name.clone(), unit, metric.help),
            }
            for value in metric.label.map_or(&[""] as &[&str], |label| label.values) {
                let of_job = job.map(|job| Label::new("job", job.to_string()));
                let own = metric.label.map(|label| Label::from_static_parts(label.key, value));
                let labels: Vec<Label> = of_job.into_iter().chain(own).collect();
                let handle = match metric.kind {
                    Kind::Counter => Handle::Counter(metrics::counter!(name.clone(), labels)),
                    Kind::Gauge => Handle::Gauge(metrics::gauge!(name.clone(), labels)),
                    Kind::Histogram => Handle::Histogram(metrics::histogram!(name.clone(), labels)),
                };
                if let Handle::Counter(counter) = &handle {
                    counter.absolute(0); // so that a rate is defined from the start
                }
                handles.entry(metric.name).or_default().insert(*value, handle);
            }
        }
        Self(handles)
    }

    /// Sets a metric without a label: a gauge or counter to the value, a histogram by one sample.
    ///
    /// # Panics
    ///
    /// If the metric is not declared, or has a label.
    pub fn set(&self, metric: Metric, value: f64) {
        self.set_series(metric, "", value);
    }

    /// Sets the series of a metric with one value of its label.
    ///
    /// # Panics
    ///
    /// If the metric is not declared, or its label has no such value.
    pub fn set_series(&self, metric: Metric, label: &str, value: f64) {
        let handle = self.series(metric.name, label);
        record(
            handle.unwrap_or_else(|| panic!("metric `{}` with label `{label}` is not declared", metric.name)),
            value,
        );
    }

    /// Adds to a counter, under a value of its label (empty without a label).
    ///
    /// # Panics
    ///
    /// If the metric is not a declared counter, or its label has no such value.
    pub fn count(&self, metric: Metric, label: &str, n: u64) {
        match self.series(metric.name, label) {
            Some(Handle::Counter(counter)) => counter.increment(n),
            _ => panic!("counter `{}` with label `{label}` is not declared", metric.name),
        }
    }

    /// Exports the counters of the job's state.
    pub fn counters(&self, c: &Counters) {
        for (metric, value) in [
            (counters::STEPS, c.steps),
            (counters::UPDATES, c.updates),
            (counters::ROLLOUTS, c.rollouts),
            (counters::GENERATED_TOKENS, c.generated_tokens),
            (counters::TRAINED_TOKENS, c.trained_tokens),
            (counters::PAIRS, c.pairs),
            (counters::TIES, c.ties),
            (counters::TRUNCATED, c.truncated),
            (counters::STALE, c.stale),
        ] {
            self.set(metric, value as f64);
        }
    }

    /// Exports a step.
    ///
    /// # Errors
    ///
    /// If a statistic has no metric; then nothing is exported.
    pub fn step(&self, s: &StepSummary) -> Result<(), Undeclared> {
        self.stats("", s.stats.iter().map(|(name, value)| (*name, *value)))?;
        self.set(updates::LOSS, s.loss);
        self.set(updates::GRADIENT_NORM, s.gradient_norm);
        self.set(updates::LEARNING_RATE, s.learning_rate);
        self.set(process::STEP_SECONDS, s.seconds.total);
        let t = &s.seconds;
        for (phase, seconds) in [
            ("generate", t.generate),
            ("policy", t.policy),
            ("reference", t.reference),
            ("reward", t.reward),
            ("critic", t.critic),
            ("forward", t.forward),
            ("backward", t.backward),
            ("optimizer", t.optimizer),
        ] {
            self.set_series(process::PHASE_SECONDS, phase, seconds);
        }
        let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        self.set_series(process::TOKENS_PER_SECOND, "generate", rate(s.generated_tokens, t.generate));
        self.set_series(process::TOKENS_PER_SECOND, "train", rate(s.trained_tokens, t.forward + t.backward));
        Ok(())
    }

    /// Exports an evaluation.
    ///
    /// # Errors
    ///
    /// If a statistic has no metric; then nothing is exported.
    pub fn evaluation(&self, e: &Evaluation) -> Result<(), Undeclared> {
        self.stats("held_out_", e.stats.iter().map(|(name, value)| (name.as_str(), *value)))
    }

    /// Sets a gauge for each statistic, all or none.
    fn stats<'a>(&self, prefix: &str, stats: impl Iterator<Item = (&'a str, f64)>) -> Result<(), Undeclared> {
        let found: Result<Vec<(&Handle, f64)>, Undeclared> =
            stats.map(|(name, value)| Ok((self.statistic(format!("{prefix}{name}"))?, value))).collect();
        found?.into_iter().for_each(|(handle, value)| record(handle, value));
        Ok(())
    }

    fn series(&self, name: &str, label: &str) -> Option<&Handle> {
        self.0.get(name)?.get(label)
    }

    /// The gauge of a statistic. Some are series of one metric: `reward`, `reward_min`, `reward_p90`.
    fn statistic(&self, name: String) -> Result<&Handle, Undeclared> {
        let of_several = WITH_STATISTICS.iter().find_map(|metric| {
            let statistic = match name.strip_prefix(metric.name)? {
                "" => MEAN,
                rest => rest.strip_prefix('_')?,
            };
            Some((metric.name, statistic)).filter(|_| metric.label.is_some_and(|l| l.values.contains(&statistic)))
        });
        let (metric, label) = of_several.unwrap_or((&name, ""));
        match self.series(metric, label) {
            Some(gauge @ Handle::Gauge(_)) => Ok(gauge),
            _ => Err(Undeclared { name }),
        }
    }
}

fn record(handle: &Handle, value: f64) {
    match handle {
        Handle::Counter(counter) => counter.absolute(value as u64),
        Handle::Gauge(gauge) => gauge.set(value),
        Handle::Histogram(histogram) => histogram.record(value),
    }
}

#[cfg(all(test, feature = "prometheus"))]
mod tests {
    use super::*;
    use crate::exporter;
    use crate::metrics::{shared, table};

    fn meters(recorder: Option<&(dyn Recorder + Send + Sync)>) -> Meters {
        Meters::new(recorder, &shared().collect::<Vec<_>>(), None)
    }

    fn summary(stats: &[(&'static str, f64)]) -> StepSummary {
        StepSummary { stats: stats.iter().copied().collect(), loss: 0.25, ..StepSummary::default() }
    }

    #[test]
    fn a_step_sets_its_metrics() {
        let recorder = exporter::recorder();
        let meters = meters(Some(&recorder));
        let stats =
            [("reward", 1.0), ("reward_p90", 0.5), ("completion_tokens", 9.0), ("kl", 2.0), ("minibatches", 3.0)];
        meters.step(&summary(&stats)).unwrap();
        meters.count(table::sources::JUDGE_REPLIES, "cached", 2);
        meters.count(table::sources::JUDGE_REPLIES, "cached", 1);
        meters.counters(&Counters { steps: 7, ..Counters::default() });
        let text = recorder.handle().render();
        for line in [
            "rehearsal_reward{stat=\"mean\"} 1",
            "rehearsal_reward{stat=\"p90\"} 0.5",
            "rehearsal_completion_tokens{stat=\"mean\"} 9",
            "rehearsal_judge_replies_total{result=\"cached\"} 3",
            "rehearsal_minibatches 3",
            "rehearsal_kl 2",
            "rehearsal_loss 0.25",
            "rehearsal_steps_total 7",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn an_undeclared_statistic_is_an_error_with_and_without_a_recorder() {
        let recorder = exporter::recorder();
        for meters in [meters(Some(&recorder)), meters(None)] {
            for name in ["curiosity", "reward_median", "steps_total", "step_seconds", "phase_seconds", ""] {
                let error = meters.step(&summary(&[("kl", 9.0), (name, 1.0)])).unwrap_err();
                assert_eq!(error, Undeclared { name: name.into() });
            }
            let evaluation = Evaluation { stats: [("elegance".to_string(), 1.0)].into(), ..Evaluation::default() };
            assert_eq!(meters.evaluation(&evaluation).unwrap_err().name, "held_out_elegance");
        }
        assert!(!recorder.handle().render().contains("rehearsal_kl 9"), "a refused step is not exported");
    }

    #[test]
    #[should_panic(expected = "metric `nowhere` with label `` is not declared")]
    fn a_metric_outside_the_groups_panics() {
        meters(None).set(Metric::gauge("nowhere", "nats", "Not in any group."), 1.0);
    }
}
