//! A critic's regression to returns.

use rehearsal_learn::Whole;
use rehearsal_learn::ppo::value_loss;
use rehearsal_lm::Batch;

use super::{Objective, Pass, length, tensor_like};
use crate::{Result, Tokens};

/// A completion with the critic's values before the update and the returns it should have foreseen.
#[derive(Debug, Clone)]
pub struct ValueTokens {
    pub tokens: Tokens,
    pub old_values: Vec<f32>,
    pub returns: Vec<f32>,
}

/// One minibatch of returns.
#[derive(Debug, Clone)]
pub struct Values {
    pub rollouts: Vec<ValueTokens>,
    /// Values may move this far from the old ones before the loss stops rewarding it.
    pub clip: Option<f64>,
}

impl Objective for Values {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        let whole = Whole {
            sequences: self.rollouts.len(),
            tokens: self.rollouts.iter().map(|r| r.tokens.completion.len()).sum(),
        };
        for part in pass.micro_batches(&self.rollouts, |r| length(&r.tokens)) {
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
}
