//! Sections that belong to methods: data of offline training, and the settings of each algorithm.

use std::path::{Path, PathBuf};

use rehearsal_learn::group::GroupScale;
use rehearsal_learn::ppo::{Aggregation, PolicyLossConfig, RatioLevel, ScorePlacement};
use rehearsal_learn::preference::{RewardDistance, SftTerm};
use rehearsal_learn::reward::{Ensemble, PairCount};
use rehearsal_learn::{AdaptiveKl, KlEstimator, NllReduction, PreferenceConfig, PreferenceKind};
use rehearsal_lm::LoraConfig;

use super::reader::{Range, Section};
use super::{ModelSource, OnBad, schema};

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Sft,
    RewardModel,
    Dpo,
    OnlineDpo,
    Ppo,
    IterativeDpo,
    Rso,
}

impl Algorithm {
    /// Names in configurations.
    pub const NAMES: [(&'static str, Algorithm); 7] = [
        ("online_dpo", Algorithm::OnlineDpo),
        ("sft", Algorithm::Sft),
        ("reward_model", Algorithm::RewardModel),
        ("dpo", Algorithm::Dpo),
        ("ppo", Algorithm::Ppo),
        ("iterative_dpo", Algorithm::IterativeDpo),
        ("rso", Algorithm::Rso),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, a)| *a == self).map_or("", |(name, _)| name)
    }

    /// Whether it learns from rows of `[data]`, not from completions of its own.
    pub fn is_offline(self) -> bool {
        matches!(self, Self::Sft | Self::RewardModel | Self::Dpo)
    }
}

/// What becomes of a row that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnLong {
    /// It is left out, and counted.
    Skip,
    /// Completions lose their ends, and are counted.
    Truncate,
    /// The job does not start.
    Fail,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq)]
pub struct DataConfig {
    pub train: Vec<PathBuf>,
    pub held_out: Option<PathBuf>,
    /// Rows of an optimiser step.
    pub batch_size: usize,
    /// Passes over the data; 0 leaves it to `job.steps`.
    pub epochs: f64,
    pub on_bad_row: OnBad,
    pub on_long: OnLong,
    /// Tokens of a sequence at most; 0 for the model's context.
    pub tokens_max: usize,
    /// Held-out rows at most.
    pub held_out_rows: usize,
}

/// `[reward_model]`
#[derive(Debug, Clone, PartialEq)]
pub struct RewardModelConfig {
    pub centering: f64,
    pub count: PairCount,
    /// Whether and how scores are normalised once training is over.
    pub normalise: Normalise,
    /// Demonstrations that shall score 0 on average.
    pub demonstrations: Option<PathBuf>,
}

/// Normalisation of a trained reward model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalise {
    Mean,
    MeanAndScale,
    No,
}

/// Trained reward models of `[reward]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RewardModelsConfig {
    pub models: Vec<ModelSource>,
    pub weight: f64,
    pub ensemble: Ensemble,
    pub clip: Option<f64>,
}

/// Where advantages come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Advantages {
    /// A critic and generalised advantage estimation.
    Gae,
    /// The other completions of the prompt, left one out.
    Rloo,
    /// The other completions of the prompt, centred and scaled.
    Grpo(GroupScale),
}

/// `[ppo]`
#[derive(Debug, Clone, PartialEq)]
pub struct PpoConfig {
    pub advantages: Advantages,
    pub kl_coef: f64,
    pub kl_estimator: KlEstimator,
    pub adaptive: Option<AdaptiveKl>,
    pub gamma: f64,
    pub lambda: f64,
    pub loss: PolicyLossConfig,
    pub value_clip: Option<f64>,
    pub whiten_rewards: bool,
    pub whiten_advantages: bool,
    pub score_clip: Option<f64>,
    pub placement: ScorePlacement,
    /// Epochs over a step's rollouts end once the mean `approx_kl` of a minibatch is above this.
    pub stop_kl: Option<f64>,
    pub pretraining: Option<PathBuf>,
    pub pretraining_weight: f64,
    /// Rows of pretraining text in each minibatch.
    pub pretraining_rows: usize,
}

/// `[critic]`
#[derive(Debug, Clone, PartialEq)]
pub struct CriticConfig {
    /// Without one: the first reward model, or the policy's trunk under a new head.
    pub model: Option<ModelSource>,
    pub learning_rate: Option<f64>,
}

/// `[update]`: how often the rollouts of a step are learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpdateConfig {
    pub epochs: usize,
    pub minibatches: usize,
}

/// `[rso]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RsoConfig {
    pub keep: usize,
    pub beta: f64,
}

pub(super) fn data(mut s: Section<'_>, base: &Path) -> DataConfig {
    let paths = s.texts("train", "a list of paths, relative to this file", "JSON Lines or Parquet with TRL's columns, or directories whose ledger is read (a job's, or one that `rehearsal label` or `rehearsal import` filled), in this order. `sft`: `prompt` and `completion`, or `messages`, or `text`. `dpo`, `reward_model`: `prompt`, `chosen`, `rejected` (texts or conversations; `margin`, `score_chosen` and `score_rejected`, and for reward models `probability`, are used where there are any), or `prompt`, `completions` and `ranks`.");
    let train: Vec<PathBuf> = paths.iter().map(|p| super::resolve(base, p)).collect();
    for path in train.iter().filter(|p| !p.exists()) {
        s.problem("train", format!("names {}, which does not exist", path.display()));
    }
    DataConfig {
        train,
        held_out: s.existing("held_out", base, "Rows for evaluation, in the same form. Without it, every tenth row of `train` is kept apart for it."),
        batch_size: s.integer("batch_size", 8, Range::within(1.0, 65_536.0), "Rows of an optimiser step.") as usize,
        epochs: s.number("epochs", 0.0, Range::from(0.0), "Passes over the data, in the place of `job.steps`; 0 leaves it to that."),
        on_bad_row: s.choice("on_bad_row", &[("fail", OnBad::Fail), ("skip", OnBad::Skip)], "A row that cannot be used (a missing column, an empty completion, chosen = rejected, a ranking of ties): stop with its place, or skip and count it."),
        on_long: s.choice("on_long", &[("skip", OnLong::Skip), ("truncate", OnLong::Truncate), ("fail", OnLong::Fail)], "A row over `tokens_max`: skip and count it, cut the ends of its completions, or stop with its place."),
        tokens_max: s.integer("tokens_max", 0, Range::from(0.0), "Tokens of a prompt with its completion at most; 0 takes the model's context.") as usize,
        held_out_rows: s.integer("held_out_rows", 256, Range::from(1.0), "Held-out rows at most.") as usize,
    }
}

const REDUCTIONS: [(&str, NllReduction); 3] = [
    ("token_mean", NllReduction::TokenMean),
    ("sequence_mean", NllReduction::SequenceMean),
    ("sequence_sum", NllReduction::SequenceSum),
];

pub(super) fn sft(mut s: Section<'_>) -> NllReduction {
    s.choice(
        "reduction",
        &REDUCTIONS,
        "Mean over all tokens of the batch, mean over sequences of their means, or of their sums.",
    )
}

pub(super) fn reward_model(mut s: Section<'_>, base: &Path) -> RewardModelConfig {
    RewardModelConfig {
        centering: s.number("centering", 0.0, Range::from(0.0), "Weight of the mean square of a pair's summed rewards, which keeps them near 0."),
        count: s.choice("pair_count", &[("all", PairCount::All), ("untied", PairCount::Untied)], "What a ranking's loss is divided by: all its pairs, or those that do not tie."),
        normalise: s.choice("normalise", &[("mean", Normalise::Mean), ("mean_and_scale", Normalise::MeanAndScale), ("no", Normalise::No)], "After training, shift the scores of demonstrations to a mean of 0 (InstructGPT), and to a standard deviation of 1."),
        demonstrations: s.existing("demonstrations", base, "Rows with `prompt` and `completion` to normalise on. Without it, the first 256 chosen completions of `data.train`."),
    }
}

pub(super) fn reward_models(s: &mut Section<'_>, base: &Path) -> RewardModelsConfig {
    let names = s.texts(
        "models",
        "a list of paths",
        "Trained reward models (Hugging Face directories with a `score` head): their score is part of the reward.",
    );
    let models = names.iter().map(|name| schema::source_of(s, "models", name, base)).collect();
    let penalty =
        s.number("ensemble_penalty", 1.0, Range::from(0.0), "`penalised`: the variance is taken off this many times.");
    let clip = s.number(
        "model_clip",
        0.0,
        Range::from(0.0),
        "Scores of reward models are clipped to plus or minus this; 0 leaves them.",
    );
    RewardModelsConfig {
        models,
        weight: s.number("model_weight", 1.0, Range::from(f64::MIN), "Weight of the reward models beside rules."),
        ensemble: s.choice(
            "ensemble",
            &[("mean", Ensemble::Mean), ("min", Ensemble::Min), ("penalised", Ensemble::Penalised(penalty))],
            "How the scores of several reward models become one.",
        ),
        clip: (clip > 0.0).then_some(clip),
    }
}

/// The settings of a preference loss.
pub(super) fn preference(s: &mut Section<'_>) -> PreferenceConfig {
    let gamma = s.number("gamma", 1.0, Range::from(f64::MIN), "`simpo`: target margin.");
    let delta = s.number("delta", 1.0, Range::from(0.0), "`slic`: margin of the calibration, in nats.");
    let eta = s.number("eta", 1.0, Range::from(0.0), "`reward_*`: scale of the score gap.");
    let average = s.flag("average", false, "`reward_*`: divide log-ratios by the lengths of completions.");
    let aware = |distance| PreferenceKind::RewardAware { distance, eta, average };
    let kinds = [
        ("sigmoid", PreferenceKind::Sigmoid),
        ("robust", PreferenceKind::Robust),
        ("sigmoid_norm", PreferenceKind::SigmoidNorm),
        ("hinge", PreferenceKind::Hinge),
        ("ipo", PreferenceKind::Ipo),
        ("ipo_sum", PreferenceKind::IpoSum),
        ("exo", PreferenceKind::Exo),
        ("nca", PreferenceKind::Nca),
        ("sppo_hard", PreferenceKind::SppoHard),
        ("apo_zero", PreferenceKind::ApoZero),
        ("apo_down", PreferenceKind::ApoDown),
        ("simpo", PreferenceKind::SimPo { gamma }),
        ("slic_hinge", PreferenceKind::SlicHinge),
        ("slic", PreferenceKind::Slic { delta }),
        ("reward_bwd_kl", aware(RewardDistance::BackwardKl)),
        ("reward_fwd_kl", aware(RewardDistance::ForwardKl)),
        ("reward_sq", aware(RewardDistance::Squared)),
    ];
    let weight = s.number("sft_weight", 0.0, Range::from(0.0), "Weight of the chosen completions' negative log-likelihood: with `sigmoid` this is RPO (α), with `slic` the regulariser (λ).");
    let reduction = s.choice("sft_reduction", &REDUCTIONS, "How that likelihood is averaged: `token_mean` is TRL's, `sequence_mean` that of the papers on RPO, `sequence_sum` SLiC's.");
    let config = PreferenceConfig {
        kind: s.choice(
            "kind",
            &kinds,
            "Loss of a pair; docs/methods.md names the papers. `reward_*` are reward-aware RPO.",
        ),
        beta: s.number("beta", 0.1, Range::above(0.0), "Strength of the pull to the reference (τ for IPO)."),
        label_smoothing: s.number(
            "label_smoothing",
            0.0,
            Range::within(0.0, 0.499),
            "Probability that a verdict is wrong; for `sigmoid`, `robust`, `simpo`, and needed by `exo`.",
        ),
        sft: (weight > 0.0).then_some(SftTerm { weight, reduction }),
    };
    if let Err(e) = config.validate() {
        s.problem("kind", e.to_string());
    }
    config
}

fn some(x: f64) -> Option<f64> {
    (x > 0.0).then_some(x)
}

pub(super) fn ppo(mut s: Section<'_>, base: &Path) -> PpoConfig {
    let estimators =
        [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3), ("abs", KlEstimator::Abs)];
    let estimator = s.choice("kl_estimator", &estimators, "Estimator of the KL penalty in the reward.");
    let kl_loss = s.number(
        "kl_loss_coef",
        0.0,
        Range::from(0.0),
        "Coefficient of a KL to the reference in the loss, as GRPO has it.",
    );
    let kl_loss_estimator = s.choice(
        "kl_loss_estimator",
        &[("k3", KlEstimator::K3), ("k2", KlEstimator::K2)],
        "Its estimator: `k2` has the gradient of the reverse KL.",
    );
    let target = s.number(
        "kl_target",
        0.0,
        Range::from(0.0),
        "KL of a completion, in nats, that an adaptive coefficient holds; 0 keeps the coefficient.",
    );
    let horizon = s.number(
        "kl_horizon",
        10_000.0,
        Range::above(0.0),
        "Completions over which the adaptive coefficient may change by a fifth.",
    );
    let length =
        s.number("constant_length", 64.0, Range::above(0.0), "`constant`: the length that sums are divided by.");
    let aggregation = s.choice(
        "aggregation",
        &[("token_mean", Aggregation::TokenMean), ("sequence_mean", Aggregation::SequenceMean), ("constant", Aggregation::Constant(length))],
        "How token losses become one: mean over tokens, over sequences of their means (GRPO), or sums by a constant length (Dr. GRPO).",
    );
    let level = s.choice(
        "ratio",
        &[
            ("token", RatioLevel::Token),
            ("sequence_mean", RatioLevel::SequenceMean),
            ("sequence_sum", RatioLevel::SequenceSum),
        ],
        "What probability ratios are of: tokens (PPO, GRPO), the mean of a sequence (GSPO), whole sequences (RLOO).",
    );
    let advantages = [
        ("gae", Advantages::Gae),
        ("rloo", Advantages::Rloo),
        ("grpo", Advantages::Grpo(GroupScale::Group)),
        ("grpo_batch", Advantages::Grpo(GroupScale::Batch)),
        ("dr_grpo", Advantages::Grpo(GroupScale::None)),
    ];
    let clip_low = s.number("clip_low", 0.2, Range::within(0.0, 1.0), "Ratios are clipped below at 1 minus this.");
    let clip_high = s.number("clip_high", 0.2, Range::from(0.0), "Ratios are clipped above at 1 plus this.");
    let dual = s.number(
        "dual_clip",
        0.0,
        Range::from(0.0),
        "Bound on the loss of bad completions (dual clip), above 1; 0 for none.",
    );
    if dual > 0.0 && dual <= 1.0 {
        s.problem("dual_clip", format!("= {dual} must be 0 or above 1"));
    }
    let clamp = s.number(
        "log_ratio_clamp",
        20.0,
        Range::from(0.0),
        "Log-ratios are clamped to plus or minus this; 0 leaves them.",
    );
    let value_clip = s.number(
        "value_clip",
        0.2,
        Range::from(0.0),
        "The critic's values may move this far in a step; 0 leaves them.",
    );
    let score_clip =
        s.number("score_clip", 0.0, Range::from(0.0), "Scores are clipped to plus or minus this; 0 leaves them.");
    let entropy = s.number("entropy_coef", 0.0, Range::from(0.0), "Coefficient of an entropy bonus.");
    let stop_kl = s.number(
        "stop_kl",
        0.0,
        Range::from(0.0),
        "A step's epochs end early once a minibatch has moved this far (`approx_kl`); 0 never.",
    );
    PpoConfig {
        advantages: s.choice(
            "advantages",
            &advantages,
            "Where advantages come from: a critic (`gae`), or the other completions of the prompt.",
        ),
        kl_coef: s.number(
            "kl_coef",
            0.05,
            Range::from(0.0),
            "Coefficient β of the KL penalty in the reward; the first one, if it adapts.",
        ),
        kl_estimator: estimator,
        adaptive: (target > 0.0).then_some(AdaptiveKl { target, horizon, clip: 0.2 }),
        gamma: s.number("gamma", 1.0, Range::within(0.0, 1.0), "Discount of rewards, token by token."),
        lambda: s.number("lambda", 0.95, Range::within(0.0, 1.0), "λ of generalised advantage estimation."),
        loss: PolicyLossConfig {
            clip_low,
            clip_high,
            dual_clip: some(dual).filter(|d| *d > 1.0),
            log_ratio_clamp: some(clamp),
            aggregation,
            level,
            kl: (kl_loss > 0.0).then_some((kl_loss_estimator, kl_loss)),
            entropy,
        },
        value_clip: some(value_clip),
        whiten_rewards: s.flag("whiten_rewards", false, "Give token rewards a variance of 1."),
        whiten_advantages: s.flag(
            "whiten_advantages",
            true,
            "Give advantages a mean of 0 and a variance of 1 over the step's tokens; `gae` only.",
        ),
        score_clip: some(score_clip),
        placement: s.choice("score_placement", &[("last_token", ScorePlacement::LastToken), ("one_past", ScorePlacement::OnePast)], "Where the score is paid: on the last token, or one past it where the completion is shorter than it may be (TRL since 0.12); `gae` only."),
        stop_kl: some(stop_kl),
        pretraining: s.existing(
            "pretraining",
            base,
            "Text that PPO shall not forget (the columns of `sft`): InstructGPT's PPO-ptx.",
        ),
        pretraining_weight: s.number("pretraining_weight", 1.0, Range::from(0.0), "Weight γ of its likelihood."),
        pretraining_rows: s.integer("pretraining_rows", 8, Range::from(1.0), "Rows of it in each minibatch.") as usize,
    }
}

pub(super) fn critic(mut s: Section<'_>, base: &Path) -> CriticConfig {
    let rate = s.number(
        "learning_rate",
        0.0,
        Range::from(0.0),
        "Peak learning rate of the critic; 0 takes that of the policy.",
    );
    let model = s.text(
        "model",
        "a path",
        "The critic's start. Without it, the first of `reward.models` if it has the policy's tokenizer, else the policy under a new head.",
    );
    CriticConfig { model: model.map(|name| schema::source_of(&mut s, "model", &name, base)), learning_rate: some(rate) }
}

pub(super) fn update(mut s: Section<'_>) -> UpdateConfig {
    UpdateConfig {
        epochs: s.integer(
            "epochs",
            1,
            Range::within(1.0, 1000.0),
            "`ppo`, `iterative_dpo`, `rso`: passes over the completions of a step.",
        ) as usize,
        minibatches: s.integer("minibatches", 1, Range::within(1.0, 65_536.0), "Optimiser updates of each pass.")
            as usize,
    }
}

/// `[lora]`
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    pub config: LoraConfig,
    pub adapter: Option<PathBuf>,
}

pub(super) fn lora(mut s: Section<'_>, base: &Path) -> Option<LoraSettings> {
    let rank = s.integer(
        "rank",
        0,
        Range::within(0.0, 4096.0),
        "Train adapters of this rank in the place of the weights; 0 trains the weights.",
    ) as usize;
    let alpha =
        s.number("alpha", 16.0, Range::above(0.0), "The adapters' product is scaled by this divided by the rank.");
    let targets = s.texts("targets", "a list of layers", "Linear layers that have adapters, by their last names. Without it, all of a Llama's: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`.");
    let adapter =
        s.existing("adapter", base, "Adapters in PEFT's format to begin with; rank, scale and layers are then theirs.");
    let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"].map(String::from);
    let targets = if targets.is_empty() { all.to_vec() } else { targets };
    (rank > 0 || adapter.is_some()).then_some(LoraSettings { config: LoraConfig { rank, alpha, targets }, adapter })
}

pub(super) fn rso(mut s: Section<'_>) -> RsoConfig {
    RsoConfig {
        keep: s.integer(
            "keep",
            8,
            Range::within(2.0, 256.0),
            "Candidates of a prompt that rejection sampling keeps, of `rollout.completions_per_prompt`.",
        ) as usize,
        beta: s.number(
            "beta",
            0.5,
            Range::above(0.0),
            "Temperature of rejection sampling: towards 0 the best are kept, towards infinity any.",
        ),
    }
}
