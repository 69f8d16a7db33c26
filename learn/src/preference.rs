//! Losses on pairs of completions: DPO and its relatives.
//!
//! Notation: `a = log π(y_w) - log π_ref(y_w)`, `b` likewise for `y_l`, sums over completion tokens with EOS;
//! `h = β (a - b)`; `n_w`, `n_l` lengths in tokens.

use candle_core::Tensor;

use crate::token::log_sigmoid;
use crate::{Error, Result};

/// Which loss a pair is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreferenceKind {
    /// DPO (Rafailov et al. 2023, eq. 7): `-log σ(h)`; with label smoothing ε (cDPO, Mitchell 2023)
    /// `-(1-ε) log σ(h) - ε log σ(-h)`.
    Sigmoid,
    /// Robust DPO (Chowdhury et al. 2024): `[-(1-ε) log σ(h) + ε log σ(-h)] / (1 - 2ε)`.
    Robust,
    /// Length-normalised DPO: `-log σ(β (a/n_w - b/n_l))`.
    SigmoidNorm,
    /// Hinge (SLiC-norm, RSO; Liu et al. 2023): `relu(1 - h)`.
    Hinge,
    /// IPO on per-token averages (Azar et al. 2023, as its authors ran it): `(a/n_w - b/n_l - 1/(2β))²`.
    Ipo,
    /// IPO on sums, as the paper writes it: `(a - b - 1/(2β))²`.
    IpoSum,
}

/// A preference loss and its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PreferenceConfig {
    pub kind: PreferenceKind,
    /// Strength of the pull to the reference (β; τ for IPO). Above 0.
    pub beta: f64,
    /// Probability that a label is wrong (ε), from 0 to below 0.5; for `Sigmoid` and `Robust`.
    pub label_smoothing: f64,
}

impl Default for PreferenceConfig {
    fn default() -> Self {
        Self { kind: PreferenceKind::Sigmoid, beta: 0.1, label_smoothing: 0.0 }
    }
}

impl PreferenceConfig {
    /// An error that names the setting that is out of its range.
    pub fn validate(&self) -> Result<()> {
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return Err(Error::OutOfRange { name: "beta", value: self.beta, range: "above 0" });
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let value = self.label_smoothing;
            return Err(Error::OutOfRange { name: "label_smoothing", value, range: "from 0 to below 0.5" });
        }
        Ok(())
    }
}

/// Log-probabilities of pairs, each `[pairs]`: sums over completion tokens, and lengths in tokens.
pub struct PreferenceLogprobs<'a> {
    pub policy_chosen: &'a Tensor,
    pub policy_rejected: &'a Tensor,
    pub ref_chosen: &'a Tensor,
    pub ref_rejected: &'a Tensor,
    pub chosen_tokens: &'a Tensor,
    pub rejected_tokens: &'a Tensor,
}

/// The loss of each pair `[pairs]` and what is worth watching.
pub struct PreferenceLoss {
    pub losses: Tensor,
    /// `β a`, detached.
    pub chosen_rewards: Tensor,
    /// `β b`, detached.
    pub rejected_rewards: Tensor,
}

impl PreferenceLoss {
    /// `β (a - b)` of each pair.
    pub fn margins(&self) -> Result<Tensor> {
        Ok((&self.chosen_rewards - &self.rejected_rewards)?)
    }
}

/// The loss of every pair; its mean is minimised.
pub fn preference_loss(x: &PreferenceLogprobs<'_>, config: &PreferenceConfig) -> Result<PreferenceLoss> {
    config.validate()?;
    let (beta, eps) = (config.beta, config.label_smoothing);
    let a = (x.policy_chosen - x.ref_chosen)?;
    let b = (x.policy_rejected - x.ref_rejected)?;
    let h = ((&a - &b)? * beta)?;
    let per_token = || -> Result<Tensor> { Ok((a.div(x.chosen_tokens)? - b.div(x.rejected_tokens)?)?) };
    let (win, lose) = (|h: &Tensor| log_sigmoid(h), |h: &Tensor| log_sigmoid(&h.neg()?));
    let losses = match config.kind {
        PreferenceKind::Sigmoid if eps == 0.0 => win(&h)?.neg()?,
        PreferenceKind::Sigmoid => ((win(&h)? * (eps - 1.0))? - (lose(&h)? * eps)?)?,
        PreferenceKind::Robust => (((win(&h)? * (eps - 1.0))? + (lose(&h)? * eps)?)? / (1.0 - 2.0 * eps))?,
        PreferenceKind::SigmoidNorm => win(&(per_token()? * beta)?)?.neg()?,
        PreferenceKind::Hinge => (1.0 - h)?.relu()?,
        PreferenceKind::Ipo => (per_token()? - 1.0 / (2.0 * beta))?.sqr()?,
        PreferenceKind::IpoSum => ((a.clone() - &b)? - 1.0 / (2.0 * beta))?.sqr()?,
    };
    Ok(PreferenceLoss { losses, chosen_rewards: (a.detach() * beta)?, rejected_rewards: (b.detach() * beta)? })
}
