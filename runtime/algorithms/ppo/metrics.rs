//! The metrics of PPO and its relatives.

use crate::metrics::Metric;

/// Statistics of the policy's update, of advantages and of the critic.
pub const METRICS: &[Metric] = &[
    Metric::gauge("clip_fraction", "ratio", "Share of tokens whose clipped policy loss is the larger one."),
    Metric::gauge("approx_kl", "nats", "Mean over tokens of (log π - log π_old)² / 2 within a step."),
    Metric::gauge(
        "policy_entropy",
        "nats",
        "Mean over tokens of -Σ p log p of the policy; only with `ppo.entropy_coef`.",
    ),
    Metric::gauge("policy_kl", "nats", "Mean over tokens of log π_old - log π within a step."),
    Metric::gauge("ratio", "ratio", "Mean over tokens of π / π_old."),
    Metric::gauge(
        "importance_weight",
        "ratio",
        "Mean over tokens of the importance weights; `ppo.off_policy = \"decoupled\"`.",
    ),
    Metric::gauge("importance_weight_max", "ratio", "Largest importance weight of the step."),
    Metric::gauge("importance_masked", "ratio", "Share of tokens whose importance weight is masked to 0."),
    Metric::gauge("kl_coef", "ratio", "Coefficient of the KL penalty."),
    Metric::gauge("advantage", "score", "Mean over tokens of the advantages before whitening."),
    Metric::gauge("value", "score", "Mean over tokens of the critic's values."),
    Metric::gauge("return", "score", "Mean over tokens of the returns."),
    Metric::gauge(
        "value_loss",
        "score²",
        "½ mean over tokens of the critic's squared error, clipped; of the last minibatch.",
    ),
    Metric::gauge("value_clip_fraction", "ratio", "Share of tokens whose clipped value error is the larger one."),
    Metric::gauge(
        "explained_variance",
        "ratio",
        "1 - var(return - value) / var(return), before the update; at most 1.",
    ),
    Metric::gauge(
        "objective",
        "score",
        "mean(score) - β Σ_t KL_t, which PPO maximizes (InstructGPT, eq. 2, without its pretraining term).",
    ),
];
