//! Losses on pairs of completions: DPO and its relatives, RPO, and the ones that need no reference.
//!
//! Notation: `l_w`, `l_l` are `log π` of the chosen and the rejected completion, summed over their tokens with EOS;
//! `a = l_w - log π_ref(y_w)`, `b` likewise for `y_l`; `h = β (a - b)`; `n_w`, `n_l` are lengths in tokens.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::sft::{NllReduction, nll};
use crate::token::log_sigmoid;
use crate::{BatchTotals, Error, Result};

/// Loss of a preference pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum PreferenceKind {
    /// DPO (Rafailov et al. 2023, eq. 7): `-log σ(h)`; with label smoothing ε (cDPO, Mitchell 2023)
    /// `-(1-ε) log σ(h) - ε log σ(-h)`.
    Sigmoid,
    /// Robust DPO (Chowdhury et al. 2024, eq. 9): `[-(1-ε) log σ(h) + ε log σ(-h)] / (1 - 2ε)`.
    Robust,
    /// Length-normalised DPO (Lambert et al. 2024): `-log σ(β (a/n_w - b/n_l))`.
    SigmoidNorm,
    /// Hinge (SLiC-norm; Liu et al. 2023, RSO eq. 8): `relu(1 - h)`.
    Hinge,
    /// IPO on per-token averages (Azar et al. 2023, as its authors ran it): `(a/n_w - b/n_l - 1/(2β))²`.
    Ipo,
    /// IPO on sums, as the paper writes it (eq. 17): `(a - b - 1/(2β))²`.
    IpoSum,
    /// EXO on pairs (Ji et al. 2024, eq. 16): `σ(h)(log σ(h) - log(1-ε)) + σ(-h)(log σ(-h) - log ε)`.
    Exo,
    /// NCA on pairs (Chen et al. 2024, "Noise Contrastive Alignment"): `-log σ(βa) - ½ log σ(-βa) - ½ log σ(-βb)`.
    Nca,
    /// SPPO with hard labels (Wu et al. 2024, eq. 4.8): `(a - 1/(2β))² + (b + 1/(2β))²`.
    SppoHard,
    /// APO-zero (D'Oosterlinck et al. 2024): `1 - σ(βa) + σ(βb)`; raises the chosen, lowers the rejected.
    ApoZero,
    /// APO-down (D'Oosterlinck et al. 2024): `σ(βa) + 1 - σ(h)`; lowers both, the chosen less.
    ApoDown,
    /// SimPO (Meng et al. 2024, eq. 6), without a reference: `-log σ(β(l_w/n_w - l_l/n_l) - γ)`.
    SimPo {
        /// Target margin γ; 0 or more.
        gamma: f64,
    },
    /// SLiC's hinge as RSO writes it (eq. 9), without a reference: `relu(1 - β(l_w - l_l))`.
    SlicHinge,
    /// SLiC-HF's calibration (Zhao et al. 2023, eq. 3), without a reference: `relu(δ - l_w + l_l)`; its regulariser is
    /// an [`SftTerm`] with [`NllReduction::SequenceSum`]. β is not used.
    Slic {
        /// Margin δ; 0 or more.
        delta: f64,
    },
    /// Reward-aware RPO (Nemotron-4, Adler et al. 2024, §3.3.3; Sun et al. 2025): the distance of `h` from the reward
    /// gap `Δ = η (r*_w - r*_l)` of a reward model.
    RewardAware {
        /// Distance of `h` from `Δ`.
        distance: RewardDistance,
        /// Scale η of the rewards.
        eta: f64,
        /// Whether `a` and `b` are divided by the lengths.
        average: bool,
    },
}

/// The distance of [`PreferenceKind::RewardAware`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RewardDistance {
    /// `KL(Bern σ(Δ) ‖ Bern σ(h))`: Nemotron-4's; NeMo's `rpo_bwd_kl`. With `Δ = ∞` it is DPO.
    BackwardKl,
    /// `KL(Bern σ(h) ‖ Bern σ(Δ))`: NeMo's `rpo_fwd_kl`.
    ForwardKl,
    /// `(h - Δ)²`: NeMo's `rpo_sq`.
    Squared,
}

/// SFT term on the chosen completions: `weight · NLL(y_w)`. With [`PreferenceKind::Sigmoid`] this is RPO: per-pair
/// mean as in Pang et al. 2024 (eq. 2) and Liu et al. 2024 (eq. 9), or mean over the batch's tokens as in TRL.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SftTerm {
    /// α; 0 or more.
    pub weight: f64,
    /// How the negative log-likelihood is averaged.
    pub reduction: NllReduction,
}

/// A preference loss and its settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PreferenceConfig {
    /// Formula of the loss.
    pub kind: PreferenceKind,
    /// Strength of the regularisation to the reference (β; τ for IPO). Above 0.
    pub beta: f64,
    /// Probability that a label is wrong (ε), from 0 to below 0.5; for `Sigmoid`, `Robust` and `SimPo`, and above 0 for
    /// `Exo`.
    pub label_smoothing: f64,
    /// SFT term added to the loss of pairs.
    pub sft: Option<SftTerm>,
}

impl Default for PreferenceConfig {
    fn default() -> Self {
        Self { kind: PreferenceKind::Sigmoid, beta: 0.1, label_smoothing: 0.0, sft: None }
    }
}

impl PreferenceConfig {
    /// Checks the ranges. The error names the setting and its value.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name, value, range| Err(Error::OutOfRange { name, value, range });
        let finite = |x: f64| x >= 0.0 && x.is_finite();
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return wrong("beta", self.beta, "above 0");
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            return wrong("label_smoothing", self.label_smoothing, "from 0 to below 0.5");
        }
        match self.kind {
            PreferenceKind::Exo if self.label_smoothing == 0.0 => {
                return wrong("label_smoothing", 0.0, "above 0 for `exo`, whose loss takes its logarithm");
            }
            PreferenceKind::SimPo { gamma } if !gamma.is_finite() => return wrong("gamma", gamma, "a finite number"),
            PreferenceKind::Slic { delta } if !finite(delta) => return wrong("delta", delta, "0 or more"),
            PreferenceKind::RewardAware { eta, .. } if !finite(eta) => return wrong("eta", eta, "0 or more"),
            _ => {}
        }
        match self.sft {
            Some(SftTerm { weight, .. }) if !finite(weight) => wrong("sft_weight", weight, "0 or more"),
            _ => Ok(()),
        }
    }

    /// Whether the loss compares the policy with a reference.
    pub fn needs_reference(&self) -> bool {
        use PreferenceKind::{SimPo, Slic, SlicHinge};
        !matches!(self.kind, SimPo { .. } | SlicHinge | Slic { .. })
    }

    /// Whether the loss needs scores of both completions.
    pub fn needs_scores(&self) -> bool {
        matches!(self.kind, PreferenceKind::RewardAware { .. })
    }
}

/// Inputs of [`preference_loss`], each `[pairs]`: log-probabilities summed over completion tokens, and lengths in
/// tokens.
pub struct PreferenceLogprobs<'a> {
    /// Of the chosen completions under the policy.
    pub policy_chosen: &'a Tensor,
    /// Of the rejected completions under the policy.
    pub policy_rejected: &'a Tensor,
    /// Not read by losses without a reference.
    pub ref_chosen: &'a Tensor,
    /// Of the rejected completions under the reference. Not read by losses without a reference.
    pub ref_rejected: &'a Tensor,
    /// Lengths of the chosen completions.
    pub chosen_tokens: &'a Tensor,
    /// Lengths of the rejected completions.
    pub rejected_tokens: &'a Tensor,
    /// Score of the chosen minus score of the rejected, for [`PreferenceKind::RewardAware`].
    pub score_gap: Option<&'a Tensor>,
}

/// Loss and implicit rewards of each pair, each `[pairs]`.
pub struct PreferenceLoss {
    /// Loss to differentiate.
    pub losses: Tensor,
    /// Implicit rewards of the chosen completions, detached: `β a`, or `β l_w` without a reference.
    pub chosen_rewards: Tensor,
    /// Implicit rewards of the rejected completions, detached: `β b`, or `β l_l` without a reference.
    pub rejected_rewards: Tensor,
}

impl PreferenceLoss {
    /// Reward margin of each pair `[pairs]`: `β (a - b)`.
    pub fn margins(&self) -> Result<Tensor> {
        Ok((&self.chosen_rewards - &self.rejected_rewards)?)
    }
}

/// Computes the loss of every pair, whose mean is minimised. It does not include the [`SftTerm`]: see [`chosen_nll`].
pub fn preference_loss(x: &PreferenceLogprobs<'_>, config: &PreferenceConfig) -> Result<PreferenceLoss> {
    use PreferenceKind::*;
    config.validate()?;
    let (beta, eps) = (config.beta, config.label_smoothing);
    let sums = if config.needs_reference() {
        ((x.policy_chosen - x.ref_chosen)?, (x.policy_rejected - x.ref_rejected)?)
    } else {
        (x.policy_chosen.clone(), x.policy_rejected.clone())
    };
    let average = matches!(config.kind, SigmoidNorm | Ipo | SimPo { .. } | RewardAware { average: true, .. });
    let (a, b) = if average { (sums.0.div(x.chosen_tokens)?, sums.1.div(x.rejected_tokens)?) } else { sums.clone() };
    let h = ((&a - &b)? * beta)?;
    let sigmoid = |x: &Tensor| -> Result<Tensor> { Ok(log_sigmoid(x)?.exp()?) };
    let smoothed = |h: &Tensor| -> Result<Tensor> {
        let win = log_sigmoid(h)?;
        if eps == 0.0 {
            return Ok(win.neg()?);
        }
        Ok(((win * (eps - 1.0))? - (log_sigmoid(&h.neg()?)? * eps)?)?)
    };
    let losses = match config.kind {
        Sigmoid | SigmoidNorm => smoothed(&h)?,
        Robust => {
            let (win, lose) = (log_sigmoid(&h)?, log_sigmoid(&h.neg()?)?);
            (((win * (eps - 1.0))? + (lose * eps)?)? / (1.0 - 2.0 * eps))?
        }
        Hinge | SlicHinge => (1.0 - h)?.relu()?,
        Ipo | IpoSum => ((&a - &b)? - 1.0 / (2.0 * beta))?.sqr()?,
        Exo => {
            let (win, lose) = (log_sigmoid(&h)?, log_sigmoid(&h.neg()?)?);
            let part = |log: &Tensor, label: f64| -> Result<Tensor> { Ok((log.exp()? * (log - label.ln())?)?) };
            (part(&win, 1.0 - eps)? + part(&lose, eps)?)?
        }
        Nca => {
            let (up, down) = ((&a * beta)?, (&b * beta)?);
            let push = (log_sigmoid(&up.neg()?)? + log_sigmoid(&down.neg()?)?)?;
            (log_sigmoid(&up)?.neg()? - (push * 0.5)?)?
        }
        SppoHard => {
            let target = 0.5 / beta;
            ((&a - target)?.sqr()? + (&b + target)?.sqr()?)?
        }
        ApoZero => ((1.0 - sigmoid(&(&a * beta)?)?)? + sigmoid(&(&b * beta)?)?)?,
        ApoDown => (sigmoid(&(&a * beta)?)? + (1.0 - sigmoid(&h)?)?)?,
        SimPo { gamma } => smoothed(&(h - gamma)?)?,
        Slic { delta } => (delta - (&a - &b)?)?.relu()?,
        RewardAware { distance, eta, .. } => {
            let gap = (x.score_gap.ok_or(Error::Missing("scores of both completions of a pair"))? * eta)?;
            match distance {
                RewardDistance::BackwardKl => bernoulli_kl(&gap, &h)?,
                RewardDistance::ForwardKl => bernoulli_kl(&h, &gap)?,
                RewardDistance::Squared => (h - gap)?.sqr()?,
            }
        }
    };
    // Implicit rewards are sums over tokens, also where the loss averages; without a reference they are what it
    // compares.
    let (a, b) = if config.needs_reference() { sums } else { (a, b) };
    Ok(PreferenceLoss { losses, chosen_rewards: (a.detach() * beta)?, rejected_rewards: (b.detach() * beta)? })
}

/// `KL(Bern σ(p) ‖ Bern σ(q))` of logits.
fn bernoulli_kl(p: &Tensor, q: &Tensor) -> Result<Tensor> {
    let part = |p: &Tensor, q: &Tensor| -> Result<Tensor> {
        let log = log_sigmoid(p)?;
        Ok((log.exp()? * (&log - log_sigmoid(q)?)?)?)
    };
    Ok((part(p, q)? + part(&p.neg()?, &q.neg()?)?)?)
}

/// A micro-batch's share of the [`SftTerm`], unweighted: the negative log-likelihood of the chosen completions, whose
/// token log-probabilities are `[tokens]`. `totals` counts the batch's pairs and the tokens of their chosen
/// completions.
pub fn chosen_nll(logprobs: &Tensor, spans: &[usize], term: &SftTerm, totals: BatchTotals) -> Result<Tensor> {
    nll(logprobs, spans, term.reduction, totals)
}
