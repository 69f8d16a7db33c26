//! Proximal policy optimisation (Schulman et al. 2017) on language models (Ziegler et al. 2019; InstructGPT, Ouyang et
//! al. 2022): token rewards, advantages, and the clipped losses.
//!
//! Quantities without gradients (rewards, advantages, returns) are `f64`; those with gradients are tensors over packed
//! tokens `[tokens]`, with sequence `s` at `spans[s]..spans[s + 1]`.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::kl::KlEstimator;
use crate::token::span_sums;
use crate::{BatchTotals, Error, Result};

/// Position at which the score of a completion is added to its token rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScorePlacement {
    /// On the last token (InstructGPT, OpenRLHF, NeMo).
    #[default]
    LastToken,
    /// One position past the last token, if there is one (N+ implementation details, TRL ≥ 0.12).
    OnePast,
}

/// How scores and the KL penalty become token rewards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenRewards {
    /// Coefficient β of the KL penalty.
    pub kl_coef: f64,
    /// Estimator of the KL divergence of each token.
    pub estimator: KlEstimator,
    /// Token that receives the score.
    pub placement: ScorePlacement,
    /// Scores are clipped to plus or minus this.
    pub score_clip: Option<f64>,
}

impl TokenRewards {
    /// Token rewards of one completion: `R_t = -β kl_t`, plus the score at its [placement](ScorePlacement). With
    /// [`ScorePlacement::OnePast`], and if `past_last` says that a position past the last token exists, the result has
    /// one element more than there are tokens.
    pub fn of(&self, score: f64, logprobs: &[f64], ref_logprobs: &[f64], past_last: bool) -> Vec<f64> {
        let score = self.score_clip.map_or(score, |clip| score.clamp(-clip, clip));
        let penalty = |(&p, &r): (&f64, &f64)| -self.kl_coef * self.estimator.of(p, r);
        let mut rewards: Vec<f64> = logprobs.iter().zip(ref_logprobs).map(penalty).collect();
        if self.placement == ScorePlacement::OnePast && past_last {
            rewards.push(0.0);
        }
        if let Some(last) = rewards.last_mut() {
            *last += score;
        }
        rewards
    }
}

/// Generalised advantage estimation (Schulman et al. 2016, eq. 16) of one sequence: `δ_t = R_t + γ V_{t+1} - V_t`,
/// `A_t = δ_t + γ λ A_{t+1}`, with value 0 after the end. Gives the advantages and the returns `A + V`.
pub fn gae(values: &[f64], rewards: &[f64], gamma: f64, lambda: f64) -> (Vec<f64>, Vec<f64>) {
    let n = values.len().min(rewards.len());
    let mut advantages = vec![0.0; n];
    let (mut next_value, mut next) = (0.0, 0.0);
    for t in (0..n).rev() {
        next = rewards[t] + gamma * next_value - values[t] + gamma * lambda * next;
        next_value = values[t];
        advantages[t] = next;
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

/// Whitening transform: `(x - μ) / sqrt(var + 1e-8)`, plus μ unless the mean is shifted away.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Whitening {
    mean: f64,
    scale: f64,
    offset: f64,
}

impl Whitening {
    /// The transform for the mean and variance of `x`. The variance is unbiased (TRL) or not (N+, OpenRLHF, NeMo).
    pub fn of(x: &[f64], unbiased: bool, shift_mean: bool) -> Self {
        let n = x.len().max(1) as f64;
        let mean = x.iter().sum::<f64>() / n;
        let squares = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
        // The unbiased variance of one value is undefined.
        let variance = if unbiased && x.len() > 1 { squares / (n - 1.0) } else { squares / n };
        Self { mean, scale: 1.0 / (variance + 1e-8).sqrt(), offset: if shift_mean { 0.0 } else { mean } }
    }

    /// Whitens a value.
    pub fn apply(&self, x: f64) -> f64 {
        (x - self.mean) * self.scale + self.offset
    }
}

/// Whitens values by their own mean and variance.
pub fn whiten(x: &mut [f64], unbiased: bool, shift_mean: bool) {
    let whitening = Whitening::of(x, unbiased, shift_mean);
    x.iter_mut().for_each(|x| *x = whitening.apply(*x));
}

/// Reduction of token losses to one loss.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub enum Aggregation {
    /// Mean over the batch's tokens (PPO; GRPO's `bnpo` and `dapo`).
    #[default]
    TokenMean,
    /// Mean over sequences of the mean over their tokens (GRPO as published).
    SequenceMean,
    /// Sum over tokens, divided by the number of sequences times a constant length (Dr. GRPO, Liu et al. 2025).
    Constant(f64),
}

/// Level at which the probability ratio is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum RatioLevel {
    /// Each token by itself (PPO, GRPO).
    #[default]
    Token,
    /// The mean log-ratio of a sequence's tokens (GSPO, Zheng et al. 2025).
    SequenceMean,
    /// The log-ratio of the whole sequence (RLOO, Ahmadian et al. 2024).
    SequenceSum,
}

/// Settings of [`policy_loss`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PolicyLossConfig {
    /// The ratio is clipped below at `1 - clip_low`.
    pub clip_low: f64,
    /// The ratio is clipped above at `1 + clip_high`.
    pub clip_high: f64,
    /// Dual clip (Ye et al. 2020): for negative advantages the loss is at most this times `-A`. Above 1.
    pub dual_clip: Option<f64>,
    /// Log-ratios are clamped to plus or minus this before they are exponentiated.
    pub log_ratio_clamp: Option<f64>,
    /// How token losses are averaged.
    pub aggregation: Aggregation,
    /// What an importance ratio is of.
    pub level: RatioLevel,
    /// KL to the reference as a term of the loss: estimator and coefficient.
    pub kl: Option<(KlEstimator, f64)>,
    /// Coefficient of the entropy bonus (Schulman et al. 2017, eq. 9), which is subtracted from the loss. 0 or more.
    pub entropy: f64,
}

impl Default for PolicyLossConfig {
    fn default() -> Self {
        Self {
            clip_low: 0.2,
            clip_high: 0.2,
            dual_clip: None,
            log_ratio_clamp: None,
            aggregation: Aggregation::TokenMean,
            level: RatioLevel::Token,
            kl: None,
            entropy: 0.0,
        }
    }
}

impl PolicyLossConfig {
    /// Checks the ranges. The error names the setting and its value.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name, value, range| Err(Error::OutOfRange { name, value, range });
        match self.dual_clip {
            Some(c) if !(c > 1.0 && c.is_finite()) => return wrong("dual_clip", c, "above 1"),
            _ => {}
        }
        if !(self.entropy >= 0.0 && self.entropy.is_finite()) {
            return wrong("entropy", self.entropy, "0 or more");
        }
        match (self.clip_low, self.clip_high) {
            (low, _) if !(0.0..=1.0).contains(&low) => wrong("clip_low", low, "from 0 to 1"),
            (_, high) if !(high >= 0.0 && high.is_finite()) => wrong("clip_high", high, "0 or more"),
            _ => Ok(()),
        }
    }
}

/// Inputs of [`policy_loss`], each `[tokens]`.
pub struct PolicyTokens<'a> {
    /// Log-probabilities under the policy that is trained.
    pub logprobs: &'a Tensor,
    /// Log-probabilities before the update, computed by the trainer, without top-k, top-p and min-p.
    pub old_logprobs: &'a Tensor,
    /// Advantages.
    pub advantages: &'a Tensor,
    /// Needed for the KL term.
    pub ref_logprobs: Option<&'a Tensor>,
    /// Entropies of the predicted distributions; needed for an entropy bonus.
    pub entropies: Option<&'a Tensor>,
    /// [Importance weights](crate::importance) of the tokens, which multiply the clipped losses; `None` for 1.
    pub weights: Option<&'a Tensor>,
    /// Offsets of the sequences, `[sequences + 1]`.
    pub spans: &'a [usize],
}

/// A micro-batch's share of the policy loss, and statistics summed over its tokens.
pub struct PolicyLoss {
    /// Share of the loss, a scalar to differentiate.
    pub loss: Tensor,
    /// Number of tokens whose clipped loss is the larger one.
    pub clipped: f64,
    /// `Σ (log π - log π_old)² / 2`.
    pub approx_kl: f64,
    /// `Σ (log π_old - log π)`.
    pub policy_kl: f64,
    /// `Σ ratio`.
    pub ratio: f64,
    /// Ratio of each token `[tokens]`, detached.
    pub ratios: Tensor,
}

/// Clipped policy loss (Schulman et al. 2017, eq. 7): `max(-Aρ, -A clip(ρ, 1 - ε_low, 1 + ε_high))` with
/// `ρ = exp(log π - log π_old)`, aggregated. The shares of all micro-batches add up to the loss of the batch.
pub fn policy_loss(x: &PolicyTokens<'_>, config: &PolicyLossConfig, totals: BatchTotals) -> Result<PolicyLoss> {
    config.validate()?;
    let difference = (x.logprobs - x.old_logprobs)?;
    let log_ratio = match config.level {
        RatioLevel::Token => difference.clone(),
        level => {
            let sums = span_sums(&difference, x.spans)?;
            let per_sequence = match level {
                RatioLevel::SequenceMean => sums.div(&lengths(x.spans, &sums)?)?,
                _ => sums,
            };
            per_sequence.index_select(&owners(x.spans, &difference)?, 0)?
        }
    };
    let log_ratio = match config.log_ratio_clamp {
        Some(limit) => log_ratio.clamp(-limit, limit)?,
        None => log_ratio,
    };
    let ratio = log_ratio.exp()?;
    let negated = x.advantages.neg()?;
    let unclipped = (&ratio * &negated)?;
    let clipped = (ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)? * &negated)?;
    let mut losses = unclipped.maximum(&clipped)?;
    if let Some(limit) = config.dual_clip {
        // The limit applies to negative advantages only.
        let negative = x.advantages.lt(0.0)?;
        losses = negative.where_cond(&losses.minimum(&(&negated * limit)?)?, &losses)?;
    }
    if let Some(weights) = x.weights {
        losses = (losses * weights)?;
    }
    if let Some((estimator, coefficient)) = config.kl {
        let reference = x.ref_logprobs.ok_or(Error::Missing("reference log-probabilities for the KL loss"))?;
        losses = (losses + (estimator.tensor(x.logprobs, reference)? * coefficient)?)?;
    }
    if config.entropy != 0.0 {
        let entropies = x.entropies.ok_or(Error::Missing("entropies for the entropy bonus"))?;
        losses = (losses - (entropies * config.entropy)?)?;
    }
    let loss = aggregate(&losses, x.spans, config.aggregation, totals)?;
    let total = |t: Tensor| -> Result<f64> { Ok(t.to_dtype(DType::F64)?.sum_all()?.to_scalar()?) };
    Ok(PolicyLoss {
        loss,
        clipped: total(clipped.gt(&unclipped)?)?,
        approx_kl: 0.5 * total(difference.detach().sqr()?)?,
        policy_kl: -total(difference.detach())?,
        ratio: total(ratio.detach())?,
        ratios: ratio.detach(),
    })
}

/// A micro-batch's share of the aggregated token losses `[tokens]`.
pub fn aggregate(losses: &Tensor, spans: &[usize], aggregation: Aggregation, totals: BatchTotals) -> Result<Tensor> {
    let sequences = totals.sequences.max(1) as f64;
    Ok(match aggregation {
        Aggregation::TokenMean => (losses.sum_all()? / totals.tokens.max(1) as f64)?,
        Aggregation::Constant(length) => (losses.sum_all()? / (sequences * length))?,
        Aggregation::SequenceMean => {
            let sums = span_sums(losses, spans)?;
            (sums.div(&lengths(spans, &sums)?)?.sum_all()? / sequences)?
        }
    })
}

fn lengths(spans: &[usize], like: &Tensor) -> Result<Tensor> {
    let lengths: Vec<f64> = spans.windows(2).map(|w| (w[1] - w[0]).max(1) as f64).collect();
    Ok(Tensor::new(lengths, like.device())?.to_dtype(like.dtype())?)
}

/// Index of the sequence of each token, `[tokens]`.
fn owners(spans: &[usize], like: &Tensor) -> Result<Tensor> {
    let owners: Vec<u32> =
        spans.windows(2).enumerate().flat_map(|(s, w)| std::iter::repeat_n(s as u32, w[1] - w[0])).collect();
    Ok(Tensor::new(owners, like.device())?)
}

/// A micro-batch's share of the value loss.
pub struct ValueLoss {
    /// Share of the loss, a scalar to differentiate.
    pub loss: Tensor,
    /// Number of tokens whose clipped error is the larger one.
    pub clipped: f64,
}

/// Value loss of the critic: `½ mean(max((V - G)², (clip(V, V_old ± ε) - G)²))`; without `clip`, `½ mean((V - G)²)`.
/// Tensors are `[tokens]`.
pub fn value_loss(
    values: &Tensor,
    old_values: &Tensor,
    returns: &Tensor,
    clip: Option<f64>,
    totals: BatchTotals,
) -> Result<ValueLoss> {
    let unclipped = (values - returns)?.sqr()?;
    let (losses, clipped) = match clip {
        None => (unclipped, 0.0),
        Some(clip) => {
            let clamped = values.minimum(&(old_values + clip)?)?.maximum(&(old_values - clip)?)?;
            let errors = (clamped - returns)?.sqr()?;
            let clipped = errors.gt(&unclipped)?.to_dtype(DType::F64)?.sum_all()?.to_scalar()?;
            (unclipped.maximum(&errors)?, clipped)
        }
    };
    Ok(ValueLoss { loss: ((losses.sum_all()? * 0.5)? / totals.tokens.max(1) as f64)?, clipped })
}

/// InstructGPT's objective (eq. 2), which is maximised: `mean(score - β Σ_t log(π/π_SFT)) + γ mean log π(pretraining)`.
///
/// A metric to report, not a loss. `log_ratios` are summed over each completion.
pub fn instructgpt_objective(scores: &[f64], log_ratios: &[f64], beta: f64, pretraining: &[f64], gamma: f64) -> f64 {
    let mean = |x: f64, n: usize| x / n.max(1) as f64;
    let reward = scores.iter().zip(log_ratios).map(|(s, k)| s - beta * k).sum();
    mean(reward, scores.len()) + gamma * mean(pretraining.iter().sum(), pretraining.len())
}

/// Explained variance of the returns by the values: `1 - var(G - V) / var(G)`, at most 1; 0 if all returns are equal.
pub fn explained_variance(values: &[f64], returns: &[f64]) -> f64 {
    let variance = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len().max(1) as f64;
        x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len().max(1) as f64
    };
    let errors: Vec<f64> = returns.iter().zip(values).map(|(g, v)| g - v).collect();
    match variance(returns) {
        0.0 => 0.0,
        all => 1.0 - variance(&errors) / all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_critic_the_advantage_is_the_reward_to_go() {
        let (advantages, returns) = gae(&[0.0; 3], &[1.0, 2.0, 4.0], 1.0, 1.0);
        assert_eq!(advantages, [7.0, 6.0, 4.0]);
        assert_eq!(returns, advantages);
    }

    #[test]
    fn a_perfect_critic_explains_everything() {
        assert_eq!(explained_variance(&[1.0, 2.0, 4.0], &[1.0, 2.0, 4.0]), 1.0);
        assert_eq!(explained_variance(&[0.0; 3], &[1.0, 2.0, 4.0]), 0.0);
        assert_eq!(explained_variance(&[3.0; 2], &[1.0, 1.0]), 0.0);
    }

    #[test]
    fn whitening_one_value_gives_zero() {
        let mut one = [3.0];
        whiten(&mut one, true, true);
        assert_eq!(one, [0.0]);
    }
}
