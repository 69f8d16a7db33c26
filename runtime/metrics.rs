//! Every metric, in one table: name, kind, unit and formula. `docs/metrics.md` is made from it.

use std::fmt::Write;

use metrics::{Counter, Gauge, Histogram, Recorder, Unit};

use crate::events::StepSummary;
use crate::state::{Counters, Evaluation};

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One row of the table.
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub unit: &'static str,
    /// Label and its values, if it has one.
    pub label: Option<(&'static str, &'static [&'static str])>,
    pub help: &'static str,
}

const ROLES: (&str, &[&str]) = ("role", &["policy", "reference", "reward", "critic", "buffer", "archivist"]);
const PHASES: (&str, &[&str]) =
    ("phase", &["generate", "reference", "reward", "critic", "forward", "backward", "optimizer"]);
const RATES: (&str, &[&str]) = ("phase", &["generate", "train"]);
const QUANTILES: (&str, &[&str]) = ("stat", &["mean", "min", "max", "std"]);

macro_rules! table {
    ($($kind:ident $name:literal $unit:literal $label:expr, $help:literal;)*) => {
        /// All metrics.
        pub const TABLE: &[Metric] = &[$(Metric {
            name: concat!("rehearsal_", $name), kind: Kind::$kind, unit: $unit, label: $label, help: $help,
        }),*];
    };
}

table! {
    Counter "steps_total" "steps" None, "Steps done, with or without an update.";
    Counter "updates_total" "updates" None, "Optimiser updates; a step whose prompts all tie makes none.";
    Counter "rollouts_total" "completions" None, "Completions learned from or compared.";
    Counter "generated_tokens_total" "tokens" None, "Tokens of those completions.";
    Counter "trained_tokens_total" "tokens" None, "Tokens that went through forward and backward.";
    Counter "pairs_total" "pairs" None, "Preference pairs made.";
    Counter "ties_total" "prompts" None, "Prompts whose best and worst completion scored the same, so that no pair was made.";
    Counter "truncated_total" "completions" None, "Completions cut off by `rollout.max_new_tokens`.";
    Counter "stale_total" "completions" None, "Completions dropped from the buffer for their age (`limits.staleness_max`).";
    Counter "restarts_total" "restarts" Some(ROLES), "Times a role died and was started again, by role, in this process.";
    Gauge "reward" "score" Some(QUANTILES), "Scores of the step's completions: mean, minimum, maximum, standard deviation.";
    Gauge "kl" "nats" None, "Mean over completions of Σ_t [log π(y_t) - log π_ref(y_t)] (k1), y sampled from π.";
    Gauge "entropy" "nats" None, "Mean over sampled tokens of -log π(y_t).";
    Gauge "mismatch_kl" "nats" None, "Mean over tokens of exp(d) - 1 - d, d = trainer's minus sampler's log-probability: rounding noise when both agree. The update takes over what generation computed where that was kept (`limits.kept_tokens`), and this is then 0; with 0 kept tokens it is measured.";
    Gauge "loss" "nats" None, "Loss of the step, as its objective defines it; for PPO, of its last minibatch.";
    Gauge "nll" "nats" None, "Mean over learned tokens of -log π(token): of demonstrations, or of PPO's pretraining mix.";
    Gauge "preference_accuracy" "ratio" None, "Share of pairs that the implicit reward (DPO) or the reward model orders as the label does.";
    Gauge "margin" "nats or score" None, "Mean over pairs of β[(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)]; of a reward model, score difference.";
    Gauge "chosen_reward" "nats" None, "β(log π - log π_ref)(chosen), mean over pairs.";
    Gauge "rejected_reward" "nats" None, "β(log π - log π_ref)(rejected), mean over pairs.";
    Gauge "reward_model_score" "score" None, "Mean score that a reward model in training gives.";
    Gauge "clip_fraction" "ratio" None, "Share of tokens whose clipped policy loss is the larger one.";
    Gauge "approx_kl" "nats" None, "Mean over tokens of (log π - log π_old)² / 2 within a step.";
    Gauge "policy_entropy" "nats" None, "Mean over tokens of -Σ p log p of the policy, where `ppo.entropy_coef` asks for it.";
    Gauge "policy_kl" "nats" None, "Mean over tokens of log π_old - log π within a step.";
    Gauge "ratio" "ratio" None, "Mean over tokens of π / π_old.";
    Gauge "kl_coef" "ratio" None, "Coefficient of the KL penalty.";
    Gauge "advantage" "score" None, "Mean over tokens of the advantages before they are whitened.";
    Gauge "value" "score" None, "Mean over tokens of the critic's values.";
    Gauge "return" "score" None, "Mean over tokens of the returns.";
    Gauge "value_loss" "score²" None, "½ mean over tokens of the critic's squared error, clipped; last minibatch.";
    Gauge "value_clip_fraction" "ratio" None, "Share of tokens whose clipped value error is the larger one.";
    Gauge "explained_variance" "ratio" None, "1 - var(return - value) / var(return), before the update; at most 1.";
    Gauge "objective" "score" None, "mean(score) - β Σ_t KL_t, what PPO maximises (InstructGPT, eq. 2, without its pretraining term).";
    Gauge "minibatches" "updates" None, "Optimiser updates of the step; fewer than configured when the step's epochs end early.";
    Gauge "pairs" "pairs" None, "Pairs of the step.";
    Gauge "ties" "prompts" None, "Prompts of the step that made no pair.";
    Gauge "truncated" "ratio" None, "Share of the step's completions that were cut off by their length.";
    Gauge "score_margin" "score" None, "Score of the chosen minus score of the rejected, mean over pairs.";
    Gauge "chosen_logprob" "nats" None, "log π(chosen), summed over tokens, mean over pairs.";
    Gauge "rejected_logprob" "nats" None, "log π(rejected), summed over tokens, mean over pairs.";
    Gauge "gradient_norm" "norm" None, "Global norm of the gradients before clipping.";
    Gauge "learning_rate" "rate" None, "Learning rate of the step.";
    Gauge "completion_tokens" "tokens" None, "Mean length of the step's completions.";
    Gauge "held_out_reward" "score" None, "Mean score on the held-out prompts, at the last evaluation.";
    Gauge "held_out_kl" "nats" None, "KL to the reference on the held-out prompts, at the last evaluation.";
    Gauge "held_out_tokens" "tokens" None, "Mean length of the answers to the held-out prompts, at the last evaluation.";
    Gauge "held_out_loss" "nats" None, "Loss on the held-out rows, at the last evaluation: NLL of a token, or of a pair.";
    Gauge "held_out_accuracy" "ratio" None, "Share of held-out pairs ordered as labelled, at the last evaluation.";
    Gauge "held_out_margin" "nats or score" None, "`margin` on the held-out pairs, at the last evaluation.";
    Gauge "dropped_rows" "rows" None, "Rows of the data that were left out; `status.json` says why.";
    Gauge "tokens_per_second" "tokens/s" Some(RATES), "Tokens of the phase divided by its time, in the last step.";
    Gauge "phase_seconds" "seconds" Some(PHASES), "Time of each phase in the last step; `critic` is its values and its updates.";
    Histogram "step_seconds" "seconds" None, "Wall-clock time of a step.";
    Histogram "checkpoint_seconds" "seconds" None, "Time until a checkpoint was durable.";
    Gauge "checkpoint_bytes" "bytes" None, "Bytes written by the last checkpoint; what it shares with earlier ones does not count.";
    Gauge "checkpoint_step" "step" None, "Step of the last durable checkpoint.";
    Gauge "role_busy_seconds" "seconds" Some(ROLES), "Time each role has spent on messages, in this process.";
    Gauge "mailbox_depth" "messages" Some(ROLES), "Messages a role has waiting.";
    Gauge "disk_full" "0 or 1" None, "1 while the job waits for room on its disk.";
    Gauge "job_steps" "steps" None, "Steps the whole job has.";
}

/// Buckets of the histograms, in seconds.
pub const SECONDS_BUCKETS: &[f64] = &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];

enum Handle {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
}

/// Handles to every metric, made once on a recorder.
pub struct Meters(Vec<(&'static str, &'static str, Handle)>);

impl Meters {
    /// Describes and registers every metric on a recorder; without one, everything is dropped.
    pub fn new(recorder: Option<&(dyn Recorder + Send + Sync)>) -> Self {
        match recorder {
            Some(recorder) => metrics::with_local_recorder(recorder, Self::register),
            None => Self(Vec::new()),
        }
    }

    fn register() -> Self {
        let mut handles = Vec::new();
        for metric in TABLE {
            let name = metric.name;
            let unit = if metric.unit == "seconds" { Unit::Seconds } else { Unit::Count };
            match metric.kind {
                Kind::Counter => metrics::describe_counter!(name, unit, metric.help),
                Kind::Gauge => metrics::describe_gauge!(name, unit, metric.help),
                Kind::Histogram => metrics::describe_histogram!(name, unit, metric.help),
            }
            for value in metric.label.map_or(&[""] as &[&str], |(_, values)| values) {
                let labels = metric.label.map_or(Vec::new(), |(key, _)| vec![(key, *value)]);
                let handle = match metric.kind {
                    Kind::Counter => Handle::Counter(metrics::counter!(name, &labels)),
                    Kind::Gauge => Handle::Gauge(metrics::gauge!(name, &labels)),
                    Kind::Histogram => Handle::Histogram(metrics::histogram!(name, &labels)),
                };
                if let Handle::Counter(counter) = &handle {
                    counter.absolute(0); // so that a rate is defined from the start
                }
                handles.push((name, *value, handle));
            }
        }
        Self(handles)
    }

    /// Sets a gauge or counter, or adds a value to a histogram.
    pub(crate) fn set(&self, name: &str, label: &str, value: f64) {
        let found = self.0.iter().find(|(n, l, _)| n.strip_prefix("rehearsal_") == Some(name) && *l == label);
        match found.map(|(_, _, handle)| handle) {
            Some(Handle::Counter(counter)) => counter.absolute(value as u64),
            Some(Handle::Gauge(gauge)) => gauge.set(value),
            Some(Handle::Histogram(histogram)) => histogram.record(value),
            None => debug_assert!(self.0.is_empty(), "no metric {name} {label}"),
        }
    }

    pub(crate) fn counters(&self, c: &Counters) {
        for (name, value) in [
            ("steps_total", c.steps),
            ("updates_total", c.updates),
            ("rollouts_total", c.rollouts),
            ("generated_tokens_total", c.generated_tokens),
            ("trained_tokens_total", c.trained_tokens),
            ("pairs_total", c.pairs),
            ("ties_total", c.ties),
            ("truncated_total", c.truncated),
            ("stale_total", c.stale),
        ] {
            self.set(name, "", value as f64);
        }
    }

    pub(crate) fn step(&self, s: &StepSummary) {
        for (name, value) in &s.stats {
            match *name {
                "reward" => self.set("reward", "mean", *value),
                "reward_min" => self.set("reward", "min", *value),
                "reward_max" => self.set("reward", "max", *value),
                "reward_std" => self.set("reward", "std", *value),
                name => self.set(name, "", *value),
            }
        }
        self.set("loss", "", s.loss);
        self.set("gradient_norm", "", s.gradient_norm);
        self.set("learning_rate", "", s.learning_rate);
        self.set("step_seconds", "", s.seconds.total);
        let t = &s.seconds;
        for (phase, seconds) in [
            ("generate", t.generate),
            ("reference", t.reference),
            ("reward", t.reward),
            ("critic", t.critic),
            ("forward", t.forward),
            ("backward", t.backward),
            ("optimizer", t.optimizer),
        ] {
            self.set("phase_seconds", phase, seconds);
        }
        let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
        self.set("tokens_per_second", "generate", rate(s.generated_tokens, t.generate));
        self.set("tokens_per_second", "train", rate(s.trained_tokens, t.forward + t.backward));
    }

    pub(crate) fn evaluation(&self, e: &Evaluation) {
        for (name, value) in &e.stats {
            self.set(&format!("held_out_{name}"), "", *value);
        }
    }
}

/// The glossary as Markdown.
pub fn markdown() -> String {
    let mut out = String::from(
        "# Metrics\n\nWhat a job exports, in Prometheus' text format when `metrics.listen` is set, or to the recorder the host gives. \
         Counters of the\nalgorithm are part of every checkpoint: after a resume they stand where they would have stood. This page is made from the\n\
         program (`REHEARSAL_BLESS=1 cargo test --test it docs`).\n\n| name | kind | unit | label | what it is |\n| --- | --- | --- | --- | --- |\n",
    );
    for m in TABLE {
        let kind = format!("{:?}", m.kind).to_lowercase();
        let label = m.label.map_or(String::new(), |(key, values)| format!("`{key}`: {}", values.join(", ")));
        let _ = writeln!(out, "| `{}` | {kind} | {} | {label} | {} |", m.name, m.unit, m.help);
    }
    out
}
