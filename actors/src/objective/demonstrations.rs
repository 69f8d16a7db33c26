//! Supervised fine-tuning, by itself or as PPO's pretraining mix.

use std::sync::Arc;

use rehearsal_learn::{BatchTotals, NllReduction, sft};
use rehearsal_lm::Batch;

use super::{Pass, micro_batches, total};
use crate::Result;

/// A sequence and which of its tokens are learned from.
#[derive(Debug, Clone, PartialEq)]
pub struct Marked {
    pub tokens: Arc<Vec<u32>>,
    /// As many as tokens; the first token is never learned from.
    pub marks: Arc<Vec<bool>>,
}

impl Marked {
    /// Tokens that are learned from.
    pub fn learned(&self) -> usize {
        self.marks.iter().skip(1).filter(|&&m| m).count()
    }
}

/// Sequences whose likelihood is to rise.
#[derive(Debug, Clone)]
pub struct Demonstrations {
    pub sequences: Vec<Marked>,
    pub reduction: NllReduction,
}

impl Demonstrations {
    /// The gradients of `weight` times the negative log-likelihood.
    pub(super) fn run(&self, pass: &mut Pass<'_>, weight: f64) -> Result<()> {
        let tokens = self.sequences.iter().map(Marked::learned).sum();
        let whole = BatchTotals { sequences: self.sequences.len(), tokens };
        for part in micro_batches(&self.sequences, pass.budget, pass.cancel, |s| s.tokens.len()) {
            let batch = Batch::marked(part?.iter().map(|s| (s.tokens.as_slice(), s.marks.as_slice())));
            if batch.scored() == 0 {
                continue;
            }
            // Demonstrations are text as it is: their temperature is 1, whatever rollouts are sampled at.
            pass.micro_step(
                batch.tokens(),
                |model, _| model.forward(&batch, 1.0),
                |pass, logprobs| {
                    pass.add("nll", -total(logprobs)?, batch.scored());
                    Ok((sft::nll(logprobs, batch.spans(), self.reduction, whole)? * weight)?)
                },
            )?;
        }
        Ok(())
    }
}
