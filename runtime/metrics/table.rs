//! Declarations of metrics, by what they measure.

use super::{Label, Metric};

/// The actor that a series belongs to.
const ROLES: Label =
    Label { key: "role", values: &["policy", "sampler", "reference", "reward", "critic", "buffer", "archivist"] };
/// Whom a job waits for.
pub const WAITED_FOR: Label = Label {
    key: "whom",
    values: &[
        "policy",
        "sampler",
        "reference",
        "reward",
        "critic",
        "buffer",
        "archivist",
        "device",
        "files",
        "director",
        "nodes",
    ],
};
/// What became of completions of nodes.
const NODE_RESULTS: Label = Label { key: "result", values: &["counted", "again"] };
/// The phase of a step.
const PHASES: Label = Label {
    key: "phase",
    values: &["generate", "policy", "reference", "reward", "critic", "forward", "backward", "optimizer"],
};
/// The phases that have a token rate.
const RATES: Label = Label { key: "phase", values: &["generate", "train"] };
/// Statistics of scores.
const SCORE_STATISTICS: Label = Label { key: "stat", values: &["mean", "min", "p10", "p50", "p90", "max", "std"] };
/// Statistics of lengths.
const LENGTH_STATISTICS: Label = Label { key: "stat", values: &["mean", "p10", "p50", "p90", "max"] };
/// Metrics of which a step reports several statistics: `reward` is the mean, `reward_p90` the series `p90`.
pub(super) const WITH_STATISTICS: [Metric; 2] = [rollouts::REWARD, rollouts::COMPLETION_TOKENS];
/// The value of `stat` for the number that has the metric's own name.
pub(super) const MEAN: &str = "mean";
/// What became of a reply of a judge.
const REPLIES: Label = Label { key: "result", values: &["read", "unreadable", "cached", "failed"] };
/// Which tokens a judge counts.
const DIRECTIONS: Label = Label { key: "direction", values: &["input", "output"] };
/// Verdicts on a pair that a judge saw in both orders.
const COMPARISONS: Label = Label { key: "result", values: &["agreed", "disagreed", "undecided"] };
/// What became of an attempt of a scorer.
const ATTEMPTS: Label = Label { key: "result", values: &["scored", "late", "failed"] };
/// Memory of the process.
const MEMORY: Label = Label { key: "stat", values: &["current", "peak"] };
/// What memory is predicted to go to.
const PURPOSES: Label = Label {
    key: "purpose",
    values: &["weights", "reference", "moments", "gradients", "activations", "generation", "peak"],
};

/// Counts since the job began, kept in its checkpoints, and restarts of this process.
pub mod counters {
    use super::*;

    crate::metrics::declare! {
        STEPS = Metric::counter("steps_total", "steps", "Steps done, with or without an update.");
        UPDATES = Metric::counter("updates_total", "updates",
            "Optimizer updates. A step in which every prompt ties makes none.");
        ROLLOUTS = Metric::counter("rollouts_total", "completions", "Completions generated for training or comparison.");
        GENERATED_TOKENS = Metric::counter("generated_tokens_total", "tokens", "Tokens of those completions.");
        TRAINED_TOKENS = Metric::counter("trained_tokens_total", "tokens",
            "Tokens that went through a forward and backward pass.");
        PAIRS = Metric::counter("pairs_total", "pairs", "Preference pairs made.");
        TIES = Metric::counter("ties_total", "prompts",
            "Prompts whose best and worst completion had the same score, so that no pair was made.");
        TRUNCATED = Metric::counter("truncated_total", "completions",
            "Completions truncated at `rollout.max_new_tokens`.");
        STALE = Metric::counter("stale_total", "completions",
            "Completions dropped from the buffer because they were stale (`limits.staleness_max`).");
        RESTARTS = Metric::counter("restarts_total", "restarts",
            "Times a role died and was started again, in this process.").by(ROLES);
    }
}

/// Completions of a step, measured before its update.
pub mod rollouts {
    use super::*;

    crate::metrics::declare! {
        REWARD = Metric::gauge("reward", "score",
            "Scores of the step's completions: mean, minimum, quantiles of 10, 50 and 90 % (nearest rank), maximum, standard \
             deviation.").by(SCORE_STATISTICS);
        KL = Metric::gauge("kl", "nats",
            "Mean over completions of Σ_t [log π(y_t) - log π_ref(y_t)] (k1), y sampled from π.");
        ENTROPY = Metric::gauge("entropy", "nats", "Mean over sampled tokens of -log π(y_t).");
        MISMATCH_KL = Metric::gauge("mismatch_kl", "nats", "Mean over tokens of exp(d) - 1 - d, with d the trainer's \
            log-probability minus the sampler's: rounding noise if they agree. It is 0 where the update reuses the \
            activations of generation (`limits.kept_tokens`), and measured with `limits.kept_tokens = 0`.");
        COMPLETION_TOKENS = Metric::gauge("completion_tokens", "tokens",
            "Length of the step's completions: mean, quantiles (nearest rank), maximum.").by(LENGTH_STATISTICS);
        SKIPPED = Metric::gauge("skipped", "completions",
            "Completions of the step that are left out because the program's scorer gave them no score.");
        STALENESS = Metric::gauge("staleness", "updates", "Updates between the policy that sampled the step's completions and \
            the one that learns from them; with `rollout.ahead`.");
        TRUNCATED = Metric::gauge("truncated", "ratio",
            "Share of the step's completions truncated at `rollout.max_new_tokens`.");
    }
}

/// Updates of the trained model, whatever the objective.
pub mod updates {
    use super::*;

    crate::metrics::declare! {
        LOSS = Metric::gauge("loss", "nats",
            "Loss of the step, as its objective defines it; for PPO, of its last minibatch.");
        GRADIENT_NORM = Metric::gauge("gradient_norm", "norm", "Global norm of the gradients before clipping.");
        LEARNING_RATE = Metric::gauge("learning_rate", "rate", "Learning rate of the step.");
        MINIBATCHES = Metric::gauge("minibatches", "updates",
            "Optimizer updates of the step; fewer than configured if the step's epochs end early.");
    }
}

/// Likelihood of given tokens.
pub mod sft {
    use super::*;

    crate::metrics::declare! {
        NLL = Metric::gauge("nll", "nats", "Mean over trained tokens of -log π(token): of demonstrations, of chosen \
            completions, or of PPO's pretraining mix.");
    }
}

/// Losses on preference pairs.
pub mod preferences {
    use super::*;

    crate::metrics::declare! {
        PREFERENCE_ACCURACY = Metric::gauge("preference_accuracy", "ratio",
            "Share of pairs that the implicit reward (DPO) or the reward model orders as labelled.");
        MARGIN = Metric::gauge("margin", "nats or score", "Mean over pairs of β[(log π - log π_ref)(chosen) - \
            (log π - log π_ref)(rejected)]; for a reward model, of the score difference.");
        CHOSEN_REWARD = Metric::gauge("chosen_reward", "nats", "Mean over pairs of β(log π - log π_ref)(chosen).");
        REJECTED_REWARD = Metric::gauge("rejected_reward", "nats",
            "Mean over pairs of β(log π - log π_ref)(rejected).");
        CHOSEN_LOGPROB = Metric::gauge("chosen_logprob", "nats",
            "Mean over pairs of log π(chosen), summed over tokens.");
        REJECTED_LOGPROB = Metric::gauge("rejected_logprob", "nats",
            "Mean over pairs of log π(rejected), summed over tokens.");
        GRADIENT_WEIGHT = Metric::gauge("gradient_weight", "ratio", "Mean over pairs of σ(-margin), the factor of a pair's \
            gradient in DPO; `loss.kind = \"sigmoid\"`. 0.5 where policy and reference agree.");
        GRADIENT_WEIGHT_LOW = Metric::gauge("gradient_weight_low", "ratio",
            "Share of pairs whose gradient weight is below 0.1: there is little left to learn from them.");
        GRADIENT_WEIGHT_HIGH = Metric::gauge("gradient_weight_high", "ratio",
            "Share of pairs whose gradient weight is above 0.9: the policy orders them wrongly, or the label is wrong.");
    }
}

/// Pairs made of a step's completions.
pub mod pairs {
    use super::*;

    crate::metrics::declare! {
        PAIRS = Metric::gauge("pairs", "pairs", "Pairs of the step.");
        TIES = Metric::gauge("ties", "prompts", "Prompts of the step that made no pair.");
        SCORE_MARGIN = Metric::gauge("score_margin", "score",
            "Mean over pairs of the chosen completion's score minus the rejected one's.");
    }
}

/// The last evaluation. A number `x` of an evaluation is exported as `held_out_x`.
pub mod held_out {
    use super::*;

    crate::metrics::declare! {
        REWARD = Metric::gauge("held_out_reward", "score", "Mean score on the held-out prompts.");
        KL = Metric::gauge("held_out_kl", "nats", "KL to the reference on the held-out prompts.");
        TOKENS = Metric::gauge("held_out_tokens", "tokens", "Mean length of the answers to the held-out prompts.");
        LOSS = Metric::gauge("held_out_loss", "nats",
            "Loss on the held-out rows: negative log-likelihood of a token, or loss of a pair.");
        ACCURACY = Metric::gauge("held_out_accuracy", "ratio", "Share of held-out pairs ordered as labelled.");
        MARGIN = Metric::gauge("held_out_margin", "nats or score", "`margin` on the held-out pairs.");
        CHOSEN_LOGPROB = Metric::gauge("held_out_chosen_logprob", "nats", "`chosen_logprob` on the held-out pairs.");
        REJECTED_LOGPROB = Metric::gauge("held_out_rejected_logprob", "nats",
            "`rejected_logprob` on the held-out pairs.");
    }
}

/// Judges, people and scorers that a job asks for scores, in this process.
pub mod sources {
    use super::*;

    crate::metrics::declare! {
        JUDGE_REPLIES = Metric::counter("judge_replies_total", "replies", "Replies of the judge: those with a verdict, those \
            without one that can be read (asked for once more, then a tie), those that were cached and not asked for again, \
            and calls that failed after their retries.").by(REPLIES);
        JUDGE_SECONDS = Metric::histogram("judge_seconds", "Time of a call of the judge, with all questions of the call.");
        JUDGE_TOKENS = Metric::counter("judge_tokens_total", "tokens",
            "Tokens of questions and of replies, as the judge's server counts them.").by(DIRECTIONS);
        JUDGE_COST = Metric::gauge("judge_cost", "money",
            "Cost of the judge since the job began, in the currency of `judge.price_input` and `judge.price_output`.");
        JUDGE_COMPARISONS = Metric::counter("judge_comparisons_total", "pairs", "Pairs that the judge saw in both orders: those \
            of which it preferred the same completion twice, those of which it preferred the other one (position bias), and those \
            with a tie or without a verdict in an order.").by(COMPARISONS);
        PEOPLE_WAITING = Metric::gauge("people_waiting", "prompts",
            "Prompts at the label page that do not have all their labels; the job waits for them.");
        PEOPLE_LABELS = Metric::counter("people_labels_total", "labels", "Labels that people gave, without skips.");
        SCORER_ATTEMPTS = Metric::counter("scorer_attempts_total", "attempts", "Attempts of the program's scorer: those with a \
            score, those that took longer than the deadline, and those that failed or panicked.").by(ATTEMPTS);
        SCORER_RETRIES = Metric::counter("scorer_retries_total", "attempts",
            "Attempts of the program's scorer after a sample's first. The gauge `skipped` counts samples without a score.");
    }
}

/// Progress, time and resources of this process.
pub mod process {
    use super::*;

    crate::metrics::declare! {
        DROPPED_ROWS = Metric::gauge("dropped_rows", "rows",
            "Rows of the data that were left out; `status.json` counts them by reason.");
        TOKENS_PER_SECOND = Metric::gauge("tokens_per_second", "tokens/s",
            "Tokens of the phase divided by its time, in the last step.").by(RATES);
        PHASE_SECONDS = Metric::gauge("phase_seconds", "seconds",
            "Time of each phase in the last step; `critic` is its values and its updates.").by(PHASES);
        STEP_SECONDS = Metric::histogram("step_seconds", "Wall-clock time of a step.");
        CHECKPOINT_SECONDS = Metric::histogram("checkpoint_seconds", "Time until a checkpoint was durable.");
        CHECKPOINT_BYTES = Metric::gauge("checkpoint_bytes", "bytes",
            "Bytes written by the last checkpoint, without the shards it shares with earlier ones.");
        CHECKPOINT_INTERVAL = Metric::gauge("checkpoint_interval", "steps", "Steps between two checkpoints, as of now.");
        CHECKPOINT_STEP = Metric::gauge("checkpoint_step", "step", "Step of the last durable checkpoint.");
        ROLE_BUSY_SECONDS = Metric::gauge("role_busy_seconds", "seconds",
            "Time each role has spent on messages, in this process.").by(ROLES);
        MAILBOX_DEPTH = Metric::gauge("mailbox_depth", "messages", "Messages in the queue of each role.").by(ROLES);
        DISK_FULL = Metric::gauge("disk_full", "0 or 1", "1 while the job waits for space on its disk.");
        WAIT_SECONDS = Metric::gauge("wait_seconds", "seconds",
            "How long the job has been waiting for someone; the oldest wait for each, 0 where it waits for nothing.")
            .by(WAITED_FOR);
        NODES = Metric::gauge("nodes", "nodes", "Nodes that have joined the job (`nodes.listen`).");
        NODE_COMPLETIONS = Metric::gauge("node_completions", "completions", "Completions, in this process, that nodes \
            generated and that count; and those that were generated again because a node was not heard of or shut out.")
            .by(NODE_RESULTS);
        NODE_BYTES = Metric::gauge("node_bytes", "bytes", "Bytes of weights that nodes have asked for, in this process.");
        JOB_STEPS = Metric::gauge("job_steps", "steps", "Steps of the whole job.");
        MEMORY_BYTES = Metric::gauge("memory_bytes", "bytes",
            "Memory that the process holds, and the most it has held; where the system says so.").by(MEMORY);
        MEMORY_PREDICTED_BYTES = Metric::gauge("memory_predicted_bytes", "bytes", "Memory that the configuration predicts, by \
            purpose; `peak` is the most at a time. Of jobs that sample and whose roles are on the CPU.").by(PURPOSES);
    }
}
