//! KL divergence between the policy and its reference, and the controller that holds it near a target.

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Per-token estimator of `KL(π ‖ π_ref)` from samples of π, with `d = log π - log π_ref` (Schulman 2020,
/// "Approximating KL divergence").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum KlEstimator {
    /// `d`: unbiased, signed. The choice for a reward; as a loss its expected gradient is zero.
    #[default]
    K1,
    /// `d² / 2`: biased, low variance. As a loss it has the gradient of the reverse KL.
    K2,
    /// `exp(-d) - 1 + d`: unbiased, never negative.
    K3,
    /// `|d|` (NeMo-Aligner).
    Abs,
}

impl KlEstimator {
    /// Estimate for one token, in nats.
    pub fn of(self, logprob: f64, ref_logprob: f64) -> f64 {
        let d = logprob - ref_logprob;
        match self {
            Self::K1 => d,
            Self::K2 => 0.5 * d * d,
            Self::K3 => (-d).exp_m1() + d,
            Self::Abs => d.abs(),
        }
    }

    /// Estimates for tensors of log-probabilities of one shape, with gradients.
    pub fn tensor(self, logprobs: &Tensor, ref_logprobs: &Tensor) -> Result<Tensor> {
        let d = (logprobs - ref_logprobs)?;
        Ok(match self {
            Self::K1 => d,
            Self::K2 => (d.sqr()? * 0.5)?,
            Self::K3 => ((d.neg()?.exp()? - 1.0)? + d)?,
            Self::Abs => d.abs()?,
        })
    }
}

/// Exact KL `Σ_v π(v) [log π(v) - log π_ref(v)]` `[..]` of each row of logits `[.., vocab]`, in nats.
pub fn full(logits: &Tensor, ref_logits: &Tensor) -> Result<Tensor> {
    let logs = |z: &Tensor| -> Result<Tensor> {
        let shifted = z.broadcast_sub(&z.max_keepdim(D::Minus1)?.detach())?;
        Ok(shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
    };
    let (p, r) = (logs(logits)?, logs(ref_logits)?);
    Ok((p.exp()? * (p - r)?)?.sum(D::Minus1)?)
}

/// Adaptive coefficient of the KL penalty (Ziegler et al. 2019, §2.2):
/// `β ← β · (1 + clip(KL / target - 1, ±clip) · n / horizon)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptiveKl {
    /// Target KL per sequence, in nats, summed over its tokens.
    pub target: f64,
    /// Sequences over which the coefficient changes by at most the factor `1 ± clip`.
    pub horizon: f64,
    /// Relative errors are clipped to plus or minus this.
    pub clip: f64,
}

impl AdaptiveKl {
    /// Updated coefficient after `sequences` sequences with a mean KL of `kl` nats.
    pub fn update(&self, coefficient: f64, kl: f64, sequences: usize) -> f64 {
        let error = (kl / self.target - 1.0).clamp(-self.clip, self.clip);
        coefficient * (1.0 + error * sequences as f64 / self.horizon)
    }
}
