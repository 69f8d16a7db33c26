//! Importance weights of completions that another policy sampled than the one that learns from them: an older version, or the
//! same one computed with other rounding.
//!
//! The weight of a token is `w = π_old / π_sampler`, truncated or masked, without a gradient. It multiplies the token's loss, whose
//! ratios are against `π_old`, the policy before the update. So the clipping and the weight are decoupled (AReaL, Fu et al. 2025, eq. 5); TRL
//! and verl call it truncated importance sampling.

/// What a weight is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightLevel {
    /// Each token by itself.
    #[default]
    Token,
    /// Of all tokens of a sequence: the geometric mean of their ratios (AReaL).
    SequenceMean,
    /// Of all tokens of a sequence: the product of their ratios (TRL, verl).
    SequenceSum,
}

/// What happens to a weight outside its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutOfBounds {
    /// It becomes the bound.
    #[default]
    Truncate,
    /// It becomes 0: the tokens leave the loss, and stay in the number that it is divided by.
    Mask,
}

/// What is compared with the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BoundOn {
    /// The ratio `r` itself.
    #[default]
    Ratio,
    /// `r - 1 - ln r`, the k3 estimate of the divergence, which is 0 where the policies agree; only with
    /// [`OutOfBounds::Mask`].
    K3,
}

/// Settings of [`importance_weights`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ImportanceConfig {
    /// What a weight is of.
    pub level: WeightLevel,
    /// What happens outside the bounds.
    pub outside: OutOfBounds,
    /// What the bounds are on.
    pub bound_on: BoundOn,
    /// Lower bound; `None` for none.
    pub low: Option<f64>,
    /// Upper bound; `None` for none.
    pub high: Option<f64>,
}

/// The weights of the tokens of one sequence, given their log-probabilities under the policy before the update and under the
/// one that sampled.
pub fn importance_weights(old: &[f64], sampler: &[f64], config: &ImportanceConfig) -> Vec<f64> {
    let differences: Vec<f64> = old.iter().zip(sampler).map(|(old, sampler)| old - sampler).collect();
    let sum: f64 = differences.iter().sum();
    match config.level {
        WeightLevel::Token => differences.iter().map(|&d| bounded(d, config)).collect(),
        WeightLevel::SequenceMean => vec![bounded(sum / differences.len().max(1) as f64, config); differences.len()],
        WeightLevel::SequenceSum => vec![bounded(sum, config); differences.len()],
    }
}

fn bounded(log_ratio: f64, config: &ImportanceConfig) -> f64 {
    let ratio = log_ratio.exp();
    let (low, high) = (config.low.unwrap_or(f64::NEG_INFINITY), config.high.unwrap_or(f64::INFINITY));
    let bounded = match config.bound_on {
        BoundOn::Ratio => ratio,
        BoundOn::K3 => ratio - 1.0 - log_ratio,
    };
    match config.outside {
        OutOfBounds::Truncate => ratio.max(low).min(high),
        OutOfBounds::Mask if (low..=high).contains(&bounded) => ratio,
        OutOfBounds::Mask => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_that_agree_have_weights_of_one() {
        let logprobs = [-0.3, -2.0, -7.5];
        for level in [WeightLevel::Token, WeightLevel::SequenceMean, WeightLevel::SequenceSum] {
            for outside in [OutOfBounds::Truncate, OutOfBounds::Mask] {
                let config = ImportanceConfig { level, outside, low: Some(0.5), high: Some(2.0), ..Default::default() };
                assert_eq!(importance_weights(&logprobs, &logprobs, &config), [1.0; 3]);
            }
        }
        assert_eq!(importance_weights(&[], &[], &ImportanceConfig::default()), [0.0; 0]);
    }
}
