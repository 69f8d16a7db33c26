//! `[ppo]` and `[critic]`.

use std::path::PathBuf;

use rehearsal_learn::group::GroupScale;
use rehearsal_learn::importance::{BoundOn, ImportanceConfig, OutOfBounds, WeightLevel};
use rehearsal_learn::ppo::{Aggregation, PolicyLossConfig, RatioLevel, ScorePlacement};
use rehearsal_learn::{AdaptiveKl, KlEstimator};

use crate::config::{Keys, ModelSource, Range, Settings};

/// Where advantages come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Advantages {
    /// A critic and generalised advantage estimation.
    Gae,
    /// The prompt's other completions: leave one out.
    Rloo,
    /// The prompt's other completions: centred and scaled.
    Grpo(GroupScale),
}

/// What the ratios of completions that an older policy sampled are against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffPolicy {
    /// The policy that sampled.
    Sampler,
    /// The policy before the update, with importance weights for its difference from the one that sampled.
    Decoupled,
    /// The policy before the update, without weights: as if it had sampled.
    Uncorrected,
}

/// `[ppo]`
#[derive(Debug, Clone, PartialEq)]
pub struct PpoSettings {
    /// What advantages are computed from.
    pub advantages: Advantages,
    /// Coefficient β of the KL penalty; 0 or more.
    pub kl_coef: f64,
    /// Estimator of the KL divergence of each token.
    pub kl_estimator: KlEstimator,
    /// Adapts the coefficient to a target KL divergence; `None` keeps it.
    pub adaptive: Option<AdaptiveKl>,
    /// Discount γ of GAE and of returns, from 0 to 1.
    pub gamma: f64,
    /// λ of GAE, from 0 to 1.
    pub lambda: f64,
    /// Clipped policy loss.
    pub loss: PolicyLossConfig,
    /// What ratios are against where generation runs ahead.
    pub off_policy: OffPolicy,
    /// Importance weights of [`OffPolicy::Decoupled`].
    pub importance: ImportanceConfig,
    /// Values are clipped to the old value plus or minus this in the critic's loss; `None` does not clip.
    pub value_clip: Option<f64>,
    /// Whether token rewards are scaled to a standard deviation of 1.
    pub whiten_rewards: bool,
    /// Whether advantages are shifted and scaled to mean 0 and standard deviation 1.
    pub whiten_advantages: bool,
    /// Scores are clipped to plus or minus this; `None` does not clip.
    pub score_clip: Option<f64>,
    /// Token that receives the score.
    pub placement: ScorePlacement,
    /// A step's epochs end once the mean `approx_kl` of a minibatch is above this.
    pub stop_kl: Option<f64>,
    /// Rows whose likelihood is part of the loss (InstructGPT's pretraining mix); `None` for no such term.
    pub pretraining: Option<PathBuf>,
    /// Weight of that term.
    pub pretraining_weight: f64,
    /// Rows of pretraining text in each minibatch.
    pub pretraining_rows: usize,
}

impl Default for PpoSettings {
    fn default() -> Self {
        Self {
            advantages: Advantages::Gae,
            kl_coef: 0.05,
            kl_estimator: KlEstimator::K1,
            adaptive: None,
            gamma: 1.0,
            lambda: 0.95,
            loss: PolicyLossConfig { log_ratio_clamp: Some(20.0), ..PolicyLossConfig::default() },
            off_policy: OffPolicy::Sampler,
            importance: ImportanceConfig { high: Some(2.0), ..ImportanceConfig::default() },
            value_clip: Some(0.2),
            whiten_rewards: false,
            whiten_advantages: true,
            score_clip: None,
            placement: ScorePlacement::LastToken,
            stop_kl: None,
            pretraining: None,
            pretraining_weight: 1.0,
            pretraining_rows: 8,
        }
    }
}

impl Settings for PpoSettings {
    fn visit(&mut self, keys: &mut Keys) {
        self.visit_rewards(keys);
        self.visit_loss(keys);
        self.visit_off_policy(keys);
        self.visit_values(keys);
        self.visit_pretraining(keys);
    }
}

impl PpoSettings {
    /// Rewards and advantages.
    fn visit_rewards(&mut self, keys: &mut Keys) {
        let mut s = keys.section("ppo");
        let advantages = [
            ("gae", Advantages::Gae),
            ("rloo", Advantages::Rloo),
            ("grpo", Advantages::Grpo(GroupScale::Group)),
            ("grpo_batch", Advantages::Grpo(GroupScale::Batch)),
            ("dr_grpo", Advantages::Grpo(GroupScale::None)),
        ];
        let help = "Baseline of advantages: a critic (`gae`), or the prompt's other completions.";
        s.choice("advantages", &mut self.advantages, &advantages, help);
        let help = "Coefficient β of the KL penalty in the reward; its first value, if it adapts.";
        s.number("kl_coef", &mut self.kl_coef, Range::from(0.0), help);
        let estimators =
            [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3), ("abs", KlEstimator::Abs)];
        let help = "Estimator of the KL penalty in the reward.";
        s.choice("kl_estimator", &mut self.kl_estimator, &estimators, help);
        let mut target = self.adaptive.map_or(0.0, |a| a.target);
        let mut horizon = self.adaptive.map_or(10_000.0, |a| a.horizon);
        s.number(
            "kl_target",
            &mut target,
            Range::from(0.0),
            "KL of a completion, in nats, that an adaptive coefficient is controlled to; 0 keeps the coefficient fixed.",
        );
        let help = "Completions over which the adaptive coefficient may change by a fifth.";
        s.number("kl_horizon", &mut horizon, Range::above(0.0), help);
        self.adaptive = (target > 0.0).then_some(AdaptiveKl { target, horizon, clip: 0.2 });
        let help = "Discount of rewards, token by token.";
        s.number("gamma", &mut self.gamma, Range::within(0.0, 1.0), help);
        let help = "λ of generalised advantage estimation.";
        s.number("lambda", &mut self.lambda, Range::within(0.0, 1.0), help);
        s.flag("whiten_rewards", &mut self.whiten_rewards, "Scale token rewards to a variance of 1.");
        s.flag(
            "whiten_advantages",
            &mut self.whiten_advantages,
            "Shift and scale advantages to a mean of 0 and a variance of 1 over the step's tokens; `gae` only.",
        );
        let help = "Scores are clipped to plus or minus this; 0 leaves them.";
        s.number_or_none("score_clip", &mut self.score_clip, Range::from(0.0), help);
        s.choice(
            "score_placement",
            &mut self.placement,
            &[("last_token", ScorePlacement::LastToken), ("one_past", ScorePlacement::OnePast)],
            "Position of the score in the token rewards: on the last token, or one past it where the completion is shorter than \
             it may be (TRL since 0.12); `gae` only.",
        );
    }

    /// The policy's loss.
    fn visit_loss(&mut self, keys: &mut Keys) {
        let mut s = keys.section("ppo");
        let loss = &mut self.loss;
        let help = "Ratios are clipped below at 1 minus this.";
        s.number("clip_low", &mut loss.clip_low, Range::within(0.0, 1.0), help);
        let help = "Ratios are clipped above at 1 plus this.";
        s.number("clip_high", &mut loss.clip_high, Range::from(0.0), help);
        let help = "Bound on the loss of tokens with a negative advantage (dual clip), above 1; 0 for none.";
        s.number_or_none("dual_clip", &mut loss.dual_clip, Range::from(0.0), help);
        if let Some(dual) = loss.dual_clip.filter(|d| *d <= 1.0) {
            s.problem("dual_clip", format!("= {dual} must be 0 or above 1"));
            loss.dual_clip = None;
        }
        let help = "Log-ratios are clamped to plus or minus this; 0 leaves them.";
        s.number_or_none("log_ratio_clamp", &mut loss.log_ratio_clamp, Range::from(0.0), help);
        let mut length = if let Aggregation::Constant(length) = loss.aggregation { length } else { 64.0 };
        let help = "`constant`: the length that sums are divided by.";
        s.number("constant_length", &mut length, Range::above(0.0), help);
        if let Aggregation::Constant(own) = &mut loss.aggregation {
            *own = length;
        }
        s.choice(
            "aggregation",
            &mut loss.aggregation,
            &[
                ("token_mean", Aggregation::TokenMean),
                ("sequence_mean", Aggregation::SequenceMean),
                ("constant", Aggregation::Constant(length)),
            ],
            "How token losses become one: mean over tokens, mean over sequences of their means (GRPO), or sums divided by a \
             constant length (Dr. GRPO).",
        );
        s.choice(
            "ratio",
            &mut loss.level,
            &[
                ("token", RatioLevel::Token),
                ("sequence_mean", RatioLevel::SequenceMean),
                ("sequence_sum", RatioLevel::SequenceSum),
            ],
            "Unit of probability ratios: tokens (PPO, GRPO), the mean of a sequence (GSPO), whole sequences (RLOO).",
        );
        let (mut estimator, mut weight) = loss.kl.unwrap_or((KlEstimator::K3, 0.0));
        let help = "Coefficient of a KL to the reference in the loss, as GRPO has it.";
        s.number("kl_loss_coef", &mut weight, Range::from(0.0), help);
        let help = "Its estimator: `k2` has the gradient of the reverse KL.";
        let estimators = [("k3", KlEstimator::K3), ("k2", KlEstimator::K2)];
        s.choice("kl_loss_estimator", &mut estimator, &estimators, help);
        loss.kl = (weight > 0.0).then_some((estimator, weight));
        s.number("entropy_coef", &mut loss.entropy, Range::from(0.0), "Coefficient of an entropy bonus.");
        let help = "A step's epochs end early once `approx_kl` of a minibatch is above this; 0 never.";
        s.number_or_none("stop_kl", &mut self.stop_kl, Range::from(0.0), help);
    }

    /// Completions of an older policy.
    fn visit_off_policy(&mut self, keys: &mut Keys) {
        let mut s = keys.section("ppo");
        s.choice(
            "off_policy",
            &mut self.off_policy,
            &[
                ("sampler", OffPolicy::Sampler),
                ("decoupled", OffPolicy::Decoupled),
                ("uncorrected", OffPolicy::Uncorrected),
            ],
            "With `rollout.ahead`, what ratios are against: the policy that sampled (`sampler`); the policy before the update, with \
             importance weights π_old/π_sampler (`decoupled`: AReaL's objective, truncated importance sampling); or that without \
             weights. `decoupled` also weighs what the sampler rounds differently from the trainer.",
        );
        let importance = &mut self.importance;
        s.choice(
            "importance_level",
            &mut importance.level,
            &[
                ("token", WeightLevel::Token),
                ("sequence_mean", WeightLevel::SequenceMean),
                ("sequence_sum", WeightLevel::SequenceSum),
            ],
            "What an importance weight is of: a token, the geometric mean of a sequence (AReaL), the whole sequence (TRL).",
        );
        s.choice(
            "importance_outside",
            &mut importance.outside,
            &[("truncate", OutOfBounds::Truncate), ("mask", OutOfBounds::Mask)],
            "Weights outside the bounds become the bound, or 0.",
        );
        s.choice(
            "importance_bound_on",
            &mut importance.bound_on,
            &[("ratio", BoundOn::Ratio), ("k3", BoundOn::K3)],
            "What the bounds are on: the weight, or the k3 estimate of the divergence (with `mask`).",
        );
        if importance.bound_on == BoundOn::K3 && importance.outside == OutOfBounds::Truncate {
            s.problem("importance_bound_on", "= \"k3\" needs `ppo.importance_outside = \"mask\"`");
            importance.bound_on = BoundOn::Ratio;
        }
        let help = "Lower bound of importance weights; 0 for none.";
        s.number_or_none("importance_low", &mut importance.low, Range::from(0.0), help);
        let help = "Upper bound of importance weights; 0 for none.";
        s.number_or_none("importance_high", &mut importance.high, Range::from(0.0), help);
        if let (Some(low), Some(high)) = (importance.low, importance.high)
            && low > high
        {
            s.problem("importance_low", format!("= {low} exceeds `ppo.importance_high` = {high}"));
            importance.low = None;
        }
    }

    /// The critic's loss.
    fn visit_values(&mut self, keys: &mut Keys) {
        let help = "The critic's values may move this far in a step; 0 leaves them.";
        keys.section("ppo").number_or_none("value_clip", &mut self.value_clip, Range::from(0.0), help);
    }

    /// PPO-ptx.
    fn visit_pretraining(&mut self, keys: &mut Keys) {
        let mut s = keys.section("ppo");
        s.path(
            "pretraining",
            &mut self.pretraining,
            "Text whose likelihood is kept up (the columns of `sft`): InstructGPT's PPO-ptx.",
        );
        s.number("pretraining_weight", &mut self.pretraining_weight, Range::from(0.0), "Weight γ of its likelihood.");
        s.integer("pretraining_rows", &mut self.pretraining_rows, Range::from(1.0), "Rows of it in each minibatch.");
    }
}

/// `[critic]`
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CriticSettings {
    /// `None`: the first reward model, or the policy, under a new head.
    pub model: Option<ModelSource>,
    /// `None`: the policy's.
    pub learning_rate: Option<f64>,
}

impl Settings for CriticSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("critic");
        let help = "Peak learning rate of the critic; 0 takes that of the policy.";
        s.number_or_none("learning_rate", &mut self.learning_rate, Range::from(0.0), help);
        s.model(
            "model",
            &mut self.model,
            "The critic's start. Without it, the first of `reward.models` if it has the policy's tokenizer, else the policy \
             under a new head.",
        );
    }
}
