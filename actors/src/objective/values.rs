//! Regression of a critic's values to returns.

use rehearsal_learn::BatchTotals;
use rehearsal_learn::ppo::value_loss;
use rehearsal_lm::Batch;
use serde::{Deserialize, Serialize};

use super::{Cut, Objective, Pass, Portable, check_per_token, length, tensor_like};
use crate::{Result, Tokens};

/// A completion with one value per token in each list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ValueTokens {
    /// Prompt and completion.
    pub tokens: Tokens,
    /// The critic's values before the update.
    pub old_values: Vec<f32>,
    /// The returns that the values should predict.
    pub returns: Vec<f32>,
}

/// The clipped value loss of PPO's critic on one minibatch.
///
/// Statistics: `value_clip_fraction`, the mean over tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Values {
    /// Rollouts of the minibatch.
    pub rollouts: Vec<ValueTokens>,
    /// Values are clipped to `old_value ± clip` in the loss; `None` does not clip.
    pub clip: Option<f64>,
    /// How the rollouts are cut into leaves.
    pub cut: Cut,
}

impl Objective for Values {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        for (i, r) in self.rollouts.iter().enumerate() {
            check_per_token("rollout", i, "old_values", r.old_values.len(), &r.tokens)?;
            check_per_token("rollout", i, "returns", r.returns.len(), &r.tokens)?;
        }
        let whole = BatchTotals {
            sequences: self.rollouts.len(),
            tokens: self.rollouts.iter().map(|r| r.tokens.completion.len()).sum(),
        };
        for part in pass.micro_batches_of(&self.rollouts, &self.cut, |r| length(&r.tokens)) {
            let rollouts = part?;
            let batch = Batch::new(rollouts.iter().map(|r| r.tokens.sequence()));
            pass.micro_step(
                batch.tokens(),
                |model, _| model.forward_values(&batch),
                |pass, values| {
                    let all = |of: fn(&ValueTokens) -> &Vec<f32>| {
                        tensor_like(rollouts.iter().flat_map(|r| of(r).iter().copied()).collect(), values)
                    };
                    let loss = value_loss(values, &all(|r| &r.old_values)?, &all(|r| &r.returns)?, self.clip, whole)?;
                    pass.add("value_clip_fraction", loss.clipped, batch.scored());
                    Ok(loss.loss)
                },
            )?;
        }
        Ok(())
    }

    fn portable(&self) -> Option<Portable> {
        Some(Portable::Values(self.clone()))
    }
}
