//! Supervised fine-tuning, alone or as PPO's pretraining mix.

use std::sync::Arc;

use rehearsal_learn::{BatchTotals, NllReduction, sft};
use rehearsal_lm::Batch;
use serde::{Deserialize, Serialize};

use super::{Objective, Pass, Portable, sum_f64};
use crate::{Error, Result};

/// A token sequence with a loss mask. Clones share the tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MaskedSequence {
    /// Token ids.
    pub tokens: Arc<Vec<u32>>,
    /// One entry per token: true where the token contributes to the loss. The first token never does, since nothing
    /// predicts it.
    pub loss_mask: Arc<Vec<bool>>,
}

impl MaskedSequence {
    /// Number of tokens that contribute to the loss.
    pub fn loss_tokens(&self) -> usize {
        self.loss_mask.iter().skip(1).filter(|&&m| m).count()
    }
}

/// Supervised fine-tuning: minimizes the negative log-likelihood of the masked tokens at temperature 1.
///
/// Statistics: `nll`, the mean over tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Demonstrations {
    /// Sequences of the step.
    pub sequences: Vec<MaskedSequence>,
    /// How the loss is averaged.
    pub reduction: NllReduction,
}

impl Objective for Demonstrations {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        self.accumulate_weighted(pass, 1.0)
    }

    fn portable(&self) -> Option<Portable> {
        Some(Portable::Demonstrations(self.clone()))
    }
}

impl Demonstrations {
    /// Accumulates `weight` times the negative log-likelihood.
    pub(super) fn accumulate_weighted(&self, pass: &mut Pass<'_>, weight: f64) -> Result<()> {
        for (i, s) in self.sequences.iter().enumerate() {
            if s.loss_mask.len() != s.tokens.len() {
                let (tokens, mask) = (s.tokens.len(), s.loss_mask.len());
                return Err(Error::Data(format!(
                    "sequence {i} of the batch has {tokens} tokens and a loss mask of {mask}"
                )));
            }
        }
        let tokens = self.sequences.iter().map(MaskedSequence::loss_tokens).sum();
        let whole = BatchTotals { sequences: self.sequences.len(), tokens };
        for part in pass.micro_batches(&self.sequences, |s| s.tokens.len()) {
            let batch = Batch::marked(part?.iter().map(|s| (s.tokens.as_slice(), s.loss_mask.as_slice())));
            if batch.scored() == 0 {
                continue;
            }
            // Demonstrations were not sampled from the policy, so the sampling temperature does not apply to them.
            pass.micro_step(
                batch.tokens(),
                |model, _| model.forward(&batch, 1.0),
                |pass, logprobs| {
                    pass.add("nll", -sum_f64(logprobs)?, batch.scored());
                    Ok((sft::nll(logprobs, batch.spans(), self.reduction, whole)? * weight)?)
                },
            )?;
        }
        Ok(())
    }
}
