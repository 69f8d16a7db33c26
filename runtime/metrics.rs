//! Metrics: every metric a job exports is declared once, with name, kind, unit and formula: here, or in the file of the
//! algorithm that alone reports it.
//!
//! A file that owns metrics declares them with `declare!`, which makes a constant of each and the slice `METRICS` of all, and
//! [`GROUPS`] collects the slices. A slice that it does not collect does not compile. `docs/metrics.md` is generated from
//! the groups; `Meters` holds a handle to each metric on the job's recorder.

macro_rules! declare {
    ($($name:ident = $metric:expr;)*) => {
        $(
            #[doc = concat!("The metric `", stringify!($name), "`, as `docs/metrics.md` describes it.")]
            pub const $name: $crate::metrics::Metric = $metric;
        )*
        /// The metrics declared in this file.
        pub const METRICS: &[$crate::metrics::Metric] = &[$($name),*];
        const _: () = assert!($crate::metrics::collects(METRICS), "add this file's METRICS to metrics::GROUPS");
    };
}
pub(crate) use declare;

mod meters;
pub mod table;

use std::fmt::Write;

pub(crate) use meters::Meters;
pub use meters::{SECONDS_BUCKETS, Undeclared};

/// The metrics that every job has, by what they measure, in the order of `docs/metrics.md`.
pub const GROUPS: &[&[Metric]] = &[
    table::counters::METRICS,
    table::rollouts::METRICS,
    table::updates::METRICS,
    table::sft::METRICS,
    table::preferences::METRICS,
    table::pairs::METRICS,
    table::held_out::METRICS,
    table::sources::METRICS,
    table::process::METRICS,
];

/// Prefix of every exported name.
const PREFIX: &str = "rehearsal_";

/// Kind of a metric, as Prometheus defines it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A sum that only grows.
    Counter,
    /// A value that may rise and fall.
    Gauge,
    /// Counts of values by bucket.
    Histogram,
}

/// A label and the values it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// Name of the label.
    pub key: &'static str,
    /// All values that it may have.
    pub values: &'static [&'static str],
}

/// The declaration of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Name without the prefix `rehearsal_`: the name of the number in a step's statistics and in `history.jsonl`.
    pub name: &'static str,
    /// Kind of the metric.
    pub kind: Kind,
    /// Unit, as `docs/metrics.md` shows it.
    pub unit: &'static str,
    /// Label, if the metric has one.
    pub label: Option<Label>,
    /// What it is, or its formula.
    pub help: &'static str,
}

impl Metric {
    /// A count that only grows; its name ends in `_total`.
    pub const fn counter(name: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, unit, label: None, help }
    }

    /// A number that rises and falls.
    pub const fn gauge(name: &'static str, unit: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, unit, label: None, help }
    }

    /// A distribution of durations in seconds; its name ends in `_seconds`.
    pub const fn histogram(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Histogram, unit: "seconds", label: None, help }
    }

    /// The same metric, with one series for each value of a label.
    pub const fn by(self, label: Label) -> Self {
        Self { label: Some(label), ..self }
    }

    /// The exported name, with the prefix `rehearsal_`.
    pub fn exported_name(&self) -> String {
        format!("{PREFIX}{}", self.name)
    }
}

/// The metrics that every job has. Those of single algorithms are declared by the algorithms.
pub fn shared() -> impl Iterator<Item = &'static Metric> {
    GROUPS.iter().copied().flatten()
}

/// Whether `GROUPS` holds a slice of metrics, by its first metric.
pub(crate) const fn collects(metrics: &[Metric]) -> bool {
    let mut i = 0;
    while i < GROUPS.len() {
        if same(GROUPS[i][0].name, metrics[0].name) {
            return true;
        }
        i += 1;
    }
    false
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// The glossary of metrics as Markdown.
pub fn markdown(metrics: &[&Metric]) -> String {
    let mut out = String::from(
        "# Metrics\n\nWhat a job exports: in Prometheus' text format where `metrics.listen` is set, or to the recorder that the \
         host program gives.\nCounters of the algorithm are part of every checkpoint, so a resumed job counts on from the \
         same values. This page is generated\n(`REHEARSAL_BLESS=1 cargo test --test it docs`).\n\n\
         | name | kind | unit | label | what it is |\n| --- | --- | --- | --- | --- |\n",
    );
    for m in metrics {
        let kind = format!("{:?}", m.kind).to_lowercase();
        let label = m.label.map_or(String::new(), |l| format!("`{}`: {}", l.key, l.values.join(", ")));
        let _ = writeln!(out, "| `{}` | {kind} | {} | {label} | {} |", m.exported_name(), m.unit, m.help);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_say_the_kind() {
        let mut seen = BTreeSet::new();
        for m in shared() {
            assert!(seen.insert(m.name), "{} is declared twice", m.name);
            assert!(m.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{}", m.name);
            assert_eq!(m.kind == Kind::Counter, m.name.ends_with("_total"), "{}", m.name);
            assert!(m.kind != Kind::Histogram || m.name.ends_with("_seconds"), "{}", m.name);
            assert!(!m.help.is_empty() && !m.unit.is_empty(), "{}", m.name);
        }
        assert!(seen.len() > 40);
    }

    #[test]
    fn a_group_that_is_not_collected_is_found() {
        assert!(collects(table::pairs::METRICS));
        assert!(!collects(&[Metric::gauge("nowhere", "nats", "Not in any group.")]));
    }
}
