//! Reward models trained on preferences (Christiano et al. 2017; Stiennon et al. 2020; InstructGPT).

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::token::log_sigmoid;
use crate::{Error, Result};

/// Settings of [`pairwise`].
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct PairwiseConfig {
    /// Weight of `mean((r_c + r_r)²)`, which keeps rewards near zero (Eisenstein et al. 2023); TRL suggests 0.01.
    pub centering: f64,
}

/// Inputs of [`pairwise`], each `[pairs]`.
pub struct Pairwise<'a> {
    /// Rewards of the chosen completions.
    pub chosen: &'a Tensor,
    /// Rewards of the rejected completions.
    pub rejected: &'a Tensor,
    /// By how much the chosen reward should exceed the rejected one (Llama 2, eq. 2).
    pub margin: Option<&'a Tensor>,
    /// Probability `p` that the chosen one is better, for soft labels (RLAIF, Lee et al. 2023):
    /// `-[p log σ(Δ) + (1 - p) log σ(-Δ)]`.
    pub probability: Option<&'a Tensor>,
}

/// Bradley–Terry loss of each pair `[pairs]`: `-log σ(r_c - r_r - margin)`, plus the centering term.
pub fn pairwise(x: &Pairwise<'_>, config: &PairwiseConfig) -> Result<Tensor> {
    if !(config.centering >= 0.0 && config.centering.is_finite()) {
        return Err(Error::OutOfRange { name: "centering", value: config.centering, range: "0 or more" });
    }
    let mut gap = (x.chosen - x.rejected)?;
    if let Some(margin) = x.margin {
        gap = (gap - margin)?;
    }
    let win = log_sigmoid(&gap)?;
    let mut losses = match x.probability {
        None => win.neg()?,
        Some(p) => {
            let lose = log_sigmoid(&gap.neg()?)?;
            ((p * win)? + ((1.0 - p)? * lose)?)?.neg()?
        }
    };
    if config.centering > 0.0 {
        losses = (losses + ((x.chosen + x.rejected)?.sqr()? * config.centering)?)?;
    }
    Ok(losses)
}

/// Divisor of a prompt's sum over pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PairCount {
    /// `K (K - 1) / 2`, tied pairs included (InstructGPT, eq. 1).
    #[default]
    All,
    /// Number of pairs that are not tied.
    Untied,
}

/// K-wise ranking loss of one prompt (InstructGPT, eq. 1): `-1/C(K,2) Σ_{w ≻ l} log σ(r_w - r_l)`.
///
/// `rewards` is `[K]`; `ranks[k]` is 1 for the best, equal for ties, which give no pair. `None` if all tie.
pub fn kwise(rewards: &Tensor, ranks: &[u32], count: PairCount) -> Result<Option<Tensor>> {
    let k = rewards.dim(0)?;
    if k != ranks.len() {
        return Err(Error::Length { what: "ranks", found: ranks.len(), wanted: k });
    }
    let pairs = (0..k as u32).flat_map(|w| (0..k as u32).map(move |l| (w, l)));
    let (better, worse): (Vec<u32>, Vec<u32>) = pairs.filter(|&(w, l)| ranks[w as usize] < ranks[l as usize]).unzip();
    if better.is_empty() {
        return Ok(None);
    }
    let divisor = match count {
        PairCount::All => k * (k - 1) / 2,
        PairCount::Untied => better.len(),
    };
    let pick =
        |which: Vec<u32>| -> Result<Tensor> { Ok(rewards.index_select(&Tensor::new(which, rewards.device())?, 0)?) };
    let gaps = (pick(better)? - pick(worse)?)?;
    Ok(Some((log_sigmoid(&gaps)?.neg()?.sum_all()? / divisor as f64)?))
}

/// Normalisation of the scores of a trained reward model, so that those of demonstrations have mean 0 (InstructGPT)
/// and, with `scale`, standard deviation 1 (OpenRLHF).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisation {
    /// Mean of the scores of demonstrations.
    pub mean: f64,
    /// Unbiased standard deviation; 1 without scaling.
    pub std: f64,
}

impl Normalisation {
    /// Estimates the normalisation from the scores of demonstrations.
    pub fn of(demonstrations: &[f64], scale: bool) -> Self {
        let mean = demonstrations.iter().sum::<f64>() / demonstrations.len().max(1) as f64;
        let std = if scale { crate::group::deviation(demonstrations) } else { 1.0 };
        Self { mean, std: if std > 0.0 { std } else { 1.0 } }
    }

    /// Normalises a score.
    pub fn apply(&self, score: f64) -> f64 {
        (score - self.mean) / self.std
    }
}

/// Reduction of the scores of an ensemble of reward models to one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Ensemble {
    /// The mean.
    #[default]
    Mean,
    /// The lowest (worst-case optimisation, Coste et al. 2023).
    Min,
    /// The mean minus this times the variance (uncertainty-weighted optimisation, Coste et al. 2023, eq. 4).
    Penalised(f64),
}

impl Ensemble {
    /// Score of a completion, given those of the ensemble's members.
    pub fn of(self, scores: &[f64]) -> f64 {
        let mean = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
        match self {
            Self::Mean => mean,
            Self::Min => scores.iter().copied().fold(f64::INFINITY, f64::min),
            Self::Penalised(weight) => {
                let variance = scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / scores.len().max(1) as f64;
                mean - weight * variance
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_ranking_of_ties_has_no_loss() {
        let rewards = Tensor::new(&[1.0f64, 2.0, 3.0], &Device::Cpu).unwrap();
        assert!(kwise(&rewards, &[1, 1, 1], PairCount::All).unwrap().is_none());
        assert!(kwise(&rewards, &[1, 1], PairCount::All).is_err());
    }

    #[test]
    fn soft_labels_at_the_ends_are_hard_ones() {
        let tensor = |x: &[f64]| Tensor::new(x, &Device::Cpu).unwrap();
        let (chosen, rejected, p) = (tensor(&[1.0, 1.0]), tensor(&[0.5, 0.5]), tensor(&[1.0, 0.0]));
        let x = Pairwise { chosen: &chosen, rejected: &rejected, margin: None, probability: Some(&p) };
        let losses: Vec<f64> = pairwise(&x, &PairwiseConfig::default()).unwrap().to_vec1().unwrap();
        for (loss, gap) in losses.iter().zip([0.5f64, -0.5]) {
            assert!((loss - (-gap).exp().ln_1p()).abs() < 1e-12);
        }
    }

    #[test]
    fn ensembles_reduce_to_mean_minimum_or_penalised_mean() {
        let scores = [1.0, 2.0, 3.0];
        assert_eq!(Ensemble::Mean.of(&scores), 2.0);
        assert_eq!(Ensemble::Min.of(&scores), 1.0);
        assert!((Ensemble::Penalised(0.3).of(&scores) - 1.8).abs() < 1e-12);
    }
}
