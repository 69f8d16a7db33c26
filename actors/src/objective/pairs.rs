//! Preference losses on pairs of completions: the DPO family.

use candle_core::Tensor;
use rehearsal_learn::preference::chosen_nll;
use rehearsal_learn::{BatchTotals, PreferenceConfig, PreferenceKind, PreferenceLogprobs, preference_loss, token};
use rehearsal_lm::Batch;
use serde::{Deserialize, Serialize};

use super::{Cut, Objective, Pass, Portable, check_per_token, sum_f64, tensor_like, values_f64};
use crate::{Result, Tokens};

/// A preferred and a dispreferred completion of one prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PairTokens {
    /// Prompt and chosen completion.
    pub chosen: Tokens,
    /// Prompt and rejected completion.
    pub rejected: Tokens,
    /// Log-probability of each token when the policy sampled it; empty for completions that it did not sample.
    pub sampler_chosen: Vec<f32>,
    /// Log-probability of each token of the rejected completion when it was sampled.
    pub sampler_rejected: Vec<f32>,
    /// Log-probability of each token under the reference; empty for losses without a reference.
    pub ref_chosen: Vec<f32>,
    /// Log-probability of each token of the rejected completion under the reference.
    pub ref_rejected: Vec<f32>,
    /// Score of the chosen completion minus that of the rejected one, for losses that use scores.
    pub score_gap: Option<f64>,
}

impl PairTokens {
    /// Number of tokens that go through the model; the two completions share the prompt.
    fn size(&self) -> usize {
        self.chosen.prompt.len() + self.chosen.completion.len() + self.rejected.completion.len()
    }
}

/// A preference loss on the pairs of one step.
///
/// Statistics, as means over pairs: `preference_accuracy` (share of pairs with a positive margin), `margin`,
/// `chosen_reward`, `rejected_reward` (implicit rewards), `chosen_logprob`, `rejected_logprob` (sums over tokens); for DPO's
/// loss `gradient_weight`, and the shares `gradient_weight_low` and `gradient_weight_high` of pairs whose weight is below 0.1
/// and above 0.9; and over tokens `mismatch_kl`, for completions that the policy sampled.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pairs {
    /// Pairs of the step.
    pub pairs: Vec<PairTokens>,
    /// Loss and its settings.
    pub loss: PreferenceConfig,
    /// How the pairs are cut into leaves.
    pub cut: Cut,
}

impl Objective for Pairs {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        self.check()?;
        let whole = BatchTotals {
            sequences: self.pairs.len(),
            tokens: self.pairs.iter().map(|p| p.chosen.completion.len()).sum(),
        };
        let mut parts = pass.micro_batches_of(&self.pairs, &self.cut, PairTokens::size).peekable();
        while let Some(part) = parts.next() {
            let pairs = part?;
            // The completions of a pair are adjacent, so that they share their prompt.
            let batch = Batch::new(pairs.iter().flat_map(|p| [p.chosen.sequence(), p.rejected.sequence()]));
            let last = parts.peek().is_none();
            pass.completions_step(&batch, last, |pass, logprobs| self.loss(pass, pairs, &batch, logprobs, whole))?;
        }
        Ok(())
    }

    fn portable(&self) -> Option<Portable> {
        Some(Portable::Pairs(self.clone()))
    }
}

impl Pairs {
    fn check(&self) -> Result<()> {
        for (i, p) in self.pairs.iter().enumerate() {
            let lists = [
                ("ref_chosen", &p.ref_chosen, &p.chosen, self.loss.needs_reference()),
                ("ref_rejected", &p.ref_rejected, &p.rejected, self.loss.needs_reference()),
                ("sampler_chosen", &p.sampler_chosen, &p.chosen, false),
                ("sampler_rejected", &p.sampler_rejected, &p.rejected, false),
            ];
            for (name, list, tokens, needed) in lists {
                if needed || !list.is_empty() {
                    check_per_token("pair", i, name, list.len(), tokens)?;
                }
            }
        }
        Ok(())
    }

    fn loss(
        &self,
        pass: &mut Pass<'_>,
        pairs: &[PairTokens],
        batch: &Batch,
        logprobs: &Tensor,
        whole: BatchTotals,
    ) -> Result<Tensor> {
        let n = pairs.len();
        let sums = token::span_sums(logprobs, batch.spans())?;
        let half = |t: &Tensor, which: usize| t.reshape((n, 2))?.narrow(1, which, 1)?.squeeze(1);
        let sum = |x: &Vec<f32>| x.iter().map(|&x| f64::from(x)).sum::<f64>() as f32;
        let lengths = batch.spans().windows(2).map(|w| (w[1] - w[0]) as f32).collect();
        let lengths = tensor_like(lengths, logprobs)?;
        let gaps: Option<Vec<f32>> = pairs.iter().map(|p| p.score_gap.map(|g| g as f32)).collect();
        let gaps = gaps.map(|gaps| tensor_like(gaps, logprobs)).transpose()?;
        let (chosen, rejected) = (half(&sums, 0)?, half(&sums, 1)?);
        let loss = preference_loss(
            &PreferenceLogprobs {
                policy_chosen: &chosen,
                policy_rejected: &rejected,
                ref_chosen: &tensor_like(pairs.iter().map(|p| sum(&p.ref_chosen)).collect(), logprobs)?,
                ref_rejected: &tensor_like(pairs.iter().map(|p| sum(&p.ref_rejected)).collect(), logprobs)?,
                chosen_tokens: &half(&lengths, 0)?,
                rejected_tokens: &half(&lengths, 1)?,
                score_gap: gaps.as_ref(),
            },
            &self.loss,
        )?;
        let margin = loss.margins()?;
        let margins = values_f64(&margin)?;
        let count = |of: &dyn Fn(f64) -> bool| margins.iter().filter(|&&m| of(m)).count() as f64;
        pass.add("preference_accuracy", count(&|m| m > 0.0), n);
        pass.add("margin", sum_f64(&margin)?, n);
        if self.loss.kind == PreferenceKind::Sigmoid {
            pass.add("gradient_weight", margins.iter().copied().map(gradient_weight).sum(), n);
            pass.add("gradient_weight_low", count(&|m| gradient_weight(m) < 0.1), n);
            pass.add("gradient_weight_high", count(&|m| gradient_weight(m) > 0.9), n);
        }
        pass.add("chosen_reward", sum_f64(&loss.chosen_rewards)?, n);
        pass.add("rejected_reward", sum_f64(&loss.rejected_rewards)?, n);
        pass.add("chosen_logprob", sum_f64(&chosen)?, n);
        pass.add("rejected_logprob", sum_f64(&rejected)?, n);
        mismatch(pass, logprobs, pairs.iter().flat_map(|p| [&p.sampler_chosen, &p.sampler_rejected]))?;
        let share = (loss.losses.sum_all()? / whole.sequences as f64)?;
        let Some(term) = &self.loss.sft else { return Ok(share) };
        let (tokens, spans) = chosen_tokens(logprobs, batch.spans())?;
        let nll = chosen_nll(&tokens, &spans, term, whole)?;
        Ok((share + (nll * term.weight)?)?)
    }
}

/// Factor of a pair's gradient in DPO, from its implicit reward margin: `σ(-margin)` (Rafailov et al. 2023, section 4). 0.5
/// where policy and reference agree, near 0 for a pair that is learned, near 1 for one that is ordered wrongly.
fn gradient_weight(margin: f64) -> f64 {
    1.0 / (1.0 + margin.exp())
}

/// The log-probabilities of the chosen completions, which are sequences 0, 2, 4, ..., and their spans.
fn chosen_tokens(logprobs: &Tensor, spans: &[usize]) -> Result<(Tensor, Vec<usize>)> {
    let (mut parts, mut kept) = (Vec::new(), vec![0]);
    for w in spans.windows(2).step_by(2) {
        parts.push(logprobs.narrow(0, w[0], w[1] - w[0])?);
        kept.push(kept[kept.len() - 1] + w[1] - w[0]);
    }
    Ok((Tensor::cat(&parts, 0)?, kept))
}

/// Adds the k3 estimate of KL(sampler ‖ trainer) per token, for completions that come with the sampler's
/// log-probabilities. It is rounding error if sampler and trainer compute the same distribution.
pub(super) fn mismatch<'a>(
    pass: &mut Pass<'_>,
    logprobs: &Tensor,
    sampler: impl Iterator<Item = &'a Vec<f32>>,
) -> Result<()> {
    let sampler: Vec<f64> = sampler.flatten().map(|&x| f64::from(x)).collect();
    let trainer = values_f64(&logprobs.detach())?;
    if sampler.len() != trainer.len() {
        return Ok(()); // some completions were not sampled by the policy
    }
    let of = |(trainer, sampler): (&f64, &f64)| {
        let d = trainer - sampler;
        d.exp_m1() - d
    };
    pass.add("mismatch_kl", trainer.iter().zip(&sampler).map(of).sum(), trainer.len());
    Ok(())
}
