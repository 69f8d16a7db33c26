//! `[loss]`: the preference loss and what counts as a pair.

use rehearsal_actors::{Group, ScoredCompletion};
use rehearsal_learn::pairs::{Pair, penalise_missing_eos, select_pair};
use rehearsal_learn::preference::{RewardDistance, SftTerm};
use rehearsal_learn::{NllReduction, PreferenceConfig, PreferenceKind, TieRule};
use rehearsal_lm::generate::Finish;

use crate::config::{Keys, Range, Settings};

/// Names of reductions of negative log-likelihoods.
pub const REDUCTIONS: [(&str, NllReduction); 3] = [
    ("token_mean", NllReduction::TokenMean),
    ("sequence_mean", NllReduction::SequenceMean),
    ("sequence_sum", NllReduction::SequenceSum),
];

/// `[loss]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSettings {
    /// Loss, β and label smoothing.
    pub preference: PreferenceConfig,
    /// What happens to a prompt whose best and worst completion score the same.
    pub ties: TieRule,
    /// Subtracted from the score of a truncated completion; 0 or more.
    pub missing_eos_penalty: f64,
}

impl Default for LossSettings {
    fn default() -> Self {
        Self { preference: PreferenceConfig::default(), ties: TieRule::Skip, missing_eos_penalty: 0.0 }
    }
}

impl LossSettings {
    /// Scores of a prompt's completions as they are compared: minus the penalty if truncated.
    pub fn compared_scores(&self, group: &Group) -> Vec<f64> {
        compared_scores(group, self.missing_eos_penalty)
    }

    /// The best and the worst of a prompt's completions; `None` where they tie and ties are skipped.
    pub fn best_and_worst(&self, group: &Group) -> Option<Pair> {
        select_pair(&self.compared_scores(group), self.ties)
    }
}

/// Scores of a prompt's completions, minus the missing-EOS penalty if truncated.
pub fn compared_scores(group: &Group, missing_eos_penalty: f64) -> Vec<f64> {
    let score = |c: &ScoredCompletion| {
        penalise_missing_eos(c.judged.score, c.completion.finish != Finish::Length, missing_eos_penalty)
    };
    group.completions.iter().map(score).collect()
}

/// Parameters that belong to one kind of loss each, under the names of their keys.
struct KindParameters {
    gamma: f64,
    delta: f64,
    eta: f64,
    average: bool,
}

impl KindParameters {
    /// Those of a kind, and defaults for the others.
    fn of(kind: PreferenceKind) -> Self {
        let mut all = Self { gamma: 1.0, delta: 1.0, eta: 1.0, average: false };
        match kind {
            PreferenceKind::SimPo { gamma } => all.gamma = gamma,
            PreferenceKind::Slic { delta } => all.delta = delta,
            PreferenceKind::RewardAware { eta, average, .. } => (all.eta, all.average) = (eta, average),
            _ => {}
        }
        all
    }

    /// Sets those that a kind has.
    fn set(&self, kind: &mut PreferenceKind) {
        match kind {
            PreferenceKind::SimPo { gamma } => *gamma = self.gamma,
            PreferenceKind::Slic { delta } => *delta = self.delta,
            PreferenceKind::RewardAware { eta, average, .. } => (*eta, *average) = (self.eta, self.average),
            _ => {}
        }
    }

    /// All kinds by name.
    fn kinds(&self) -> [(&'static str, PreferenceKind); 17] {
        let &Self { gamma, delta, eta, average } = self;
        let aware = |distance| PreferenceKind::RewardAware { distance, eta, average };
        [
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
        ]
    }
}

impl Settings for LossSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("loss");
        let preference = &mut self.preference;
        let mut parameters = KindParameters::of(preference.kind);
        s.number("gamma", &mut parameters.gamma, Range::any(), "`simpo`: target margin.");
        let help = "`slic`: margin of the calibration, in nats.";
        s.number("delta", &mut parameters.delta, Range::from(0.0), help);
        s.number("eta", &mut parameters.eta, Range::from(0.0), "`reward_*`: scale of the score difference.");
        let help = "`reward_*`: divide log-ratios by the lengths of completions.";
        s.flag("average", &mut parameters.average, help);
        parameters.set(&mut preference.kind);
        let help = "Loss of a pair; docs/methods.md names the papers. `reward_*` are reward-aware RPO.";
        s.choice("kind", &mut preference.kind, &parameters.kinds(), help);
        let help = "Strength of the KL regularization towards the reference (τ for IPO).";
        s.number("beta", &mut preference.beta, Range::above(0.0), help);
        s.number(
            "label_smoothing",
            &mut preference.label_smoothing,
            Range::within(0.0, 0.499),
            "Probability that a label is wrong; for `sigmoid`, `robust` and `simpo`, and required by `exo`.",
        );
        let mut weight = preference.sft.map_or(0.0, |sft| sft.weight);
        let mut reduction = preference.sft.map_or(NllReduction::TokenMean, |sft| sft.reduction);
        s.number(
            "sft_weight",
            &mut weight,
            Range::from(0.0),
            "Weight of the chosen completions' negative log-likelihood: with `sigmoid` this is RPO (α), with `slic` the \
             regularizer (λ).",
        );
        s.choice(
            "sft_reduction",
            &mut reduction,
            &REDUCTIONS,
            "How that likelihood is averaged: `token_mean` is TRL's, `sequence_mean` that of the papers on RPO, `sequence_sum` \
             SLiC's.",
        );
        preference.sft = (weight > 0.0).then_some(SftTerm { weight, reduction });
        if let Err(e) = preference.validate() {
            s.problem("kind", e.to_string());
        }
        s.choice(
            "ties",
            &mut self.ties,
            &[("skip", TieRule::Skip), ("first", TieRule::First)],
            "Equal scores: no pair, or the first completion wins (TRL).",
        );
        let help = "Subtracted from the score of a truncated completion.";
        s.number("missing_eos_penalty", &mut self.missing_eos_penalty, Range::from(0.0), help);
    }
}
