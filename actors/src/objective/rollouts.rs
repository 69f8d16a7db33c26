//! Policy gradients: clipped losses on sampled completions, with an optional pretraining mix.

use candle_core::Tensor;
use rehearsal_learn::BatchTotals;
use rehearsal_learn::ppo::{PolicyLossConfig, PolicyTokens, policy_loss};
use rehearsal_lm::Batch;
use serde::{Deserialize, Serialize};

use super::{Cut, Demonstrations, Objective, Pass, Portable, check_per_token, length, sum_f64, tensor_like};
use crate::{Result, Tokens};

/// A sampled completion with one value per token in each list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RolloutTokens {
    /// Prompt and completion.
    pub tokens: Tokens,
    /// Log-probabilities under the policy before the update, computed by the trainer.
    pub old_logprobs: Vec<f32>,
    /// Advantage of each token of the completion.
    pub advantages: Vec<f32>,
    /// Log-probability of each token of the completion under the reference.
    pub ref_logprobs: Vec<f32>,
    /// Importance weight of each token; empty for weights of 1, for all rollouts of a step or for none.
    pub weights: Vec<f32>,
}

/// The clipped policy loss of PPO, RLOO or GRPO on one minibatch.
///
/// Statistics, as means over tokens: `clip_fraction`, `approx_kl`, `policy_kl`, `ratio`, and `policy_entropy` where the loss
/// has an entropy term; with a pretraining mix also its `nll`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rollouts {
    /// Rollouts of the minibatch.
    pub rollouts: Vec<RolloutTokens>,
    /// Loss and its settings.
    pub loss: PolicyLossConfig,
    /// How the rollouts are cut into leaves; pretraining text is cut by rows.
    pub cut: Cut,
    /// Pretraining text and the weight γ of its negative log-likelihood (InstructGPT, eq. 2).
    pub pretraining: Option<(Demonstrations, f64)>,
}

impl Objective for Rollouts {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        for (i, r) in self.rollouts.iter().enumerate() {
            check_per_token("rollout", i, "old_logprobs", r.old_logprobs.len(), &r.tokens)?;
            check_per_token("rollout", i, "advantages", r.advantages.len(), &r.tokens)?;
            check_per_token("rollout", i, "ref_logprobs", r.ref_logprobs.len(), &r.tokens)?;
            if self.is_weighted() {
                check_per_token("rollout", i, "weights", r.weights.len(), &r.tokens)?;
            }
        }
        let whole = BatchTotals {
            sequences: self.rollouts.len(),
            tokens: self.rollouts.iter().map(|r| r.tokens.completion.len()).sum(),
        };
        let mut parts = pass.micro_batches_of(&self.rollouts, &self.cut, |r| length(&r.tokens)).peekable();
        while let Some(part) = parts.next() {
            let (rollouts, last) = (part?, parts.peek().is_none());
            let mut batch = Batch::new(rollouts.iter().map(|r| r.tokens.sequence()));
            if self.loss.entropy > 0.0 {
                batch = batch.with_entropy();
            }
            pass.completions_step(&batch, last, |pass, output| self.loss(pass, rollouts, &batch, output, whole))?;
        }
        match &self.pretraining {
            Some((text, weight)) => text.accumulate_weighted(pass, *weight),
            None => Ok(()),
        }
    }

    fn portable(&self) -> Option<Portable> {
        Some(Portable::Rollouts(self.clone()))
    }
}

impl Rollouts {
    fn is_weighted(&self) -> bool {
        self.rollouts.iter().any(|r| !r.weights.is_empty())
    }

    fn loss(
        &self,
        pass: &mut Pass<'_>,
        rollouts: &[RolloutTokens],
        batch: &Batch,
        output: &Tensor,
        whole: BatchTotals,
    ) -> Result<Tensor> {
        let n = batch.scored();
        let logprobs = &output.narrow(0, 0, n)?;
        let entropies = if self.loss.entropy > 0.0 { Some(output.narrow(0, n, n)?) } else { None };
        let all = |of: fn(&RolloutTokens) -> &Vec<f32>| {
            tensor_like(rollouts.iter().flat_map(|r| of(r).iter().copied()).collect(), logprobs)
        };
        let reference = all(|r| &r.ref_logprobs)?;
        let weights = if self.is_weighted() { Some(all(|r| &r.weights)?) } else { None };
        let tokens = PolicyTokens {
            logprobs,
            old_logprobs: &all(|r| &r.old_logprobs)?,
            advantages: &all(|r| &r.advantages)?,
            ref_logprobs: Some(&reference),
            entropies: entropies.as_ref(),
            weights: weights.as_ref(),
            spans: batch.spans(),
        };
        let loss = policy_loss(&tokens, &self.loss, whole)?;
        if let Some(entropies) = &entropies {
            pass.add("policy_entropy", sum_f64(&entropies.detach())?, n);
        }
        pass.add("clip_fraction", loss.clipped, n);
        pass.add("approx_kl", loss.approx_kl, n);
        pass.add("policy_kl", loss.policy_kl, n);
        pass.add("ratio", loss.ratio, n);
        Ok(loss.loss)
    }
}
