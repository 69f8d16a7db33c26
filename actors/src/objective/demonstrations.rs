//! Supervised fine-tuning, by itself or as PPO's pretraining mix.

use std::sync::Arc;

use rehearsal_learn::{NllReduction, Whole, sft};
use rehearsal_lm::Batch;

use super::{Objective, Pass, sum_f64};
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

impl Objective for Demonstrations {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        self.accumulate_weighted(pass, 1.0)
    }
}

impl Demonstrations {
    /// Accumulates `weight` times the negative log-likelihood.
    pub(super) fn accumulate_weighted(&self, pass: &mut Pass<'_>, weight: f64) -> Result<()> {
        let tokens = self.sequences.iter().map(Marked::learned).sum();
        let whole = Whole { sequences: self.sequences.len(), tokens };
        for part in pass.micro_batches(&self.sequences, |s| s.tokens.len()) {
            let batch = Batch::marked(part?.iter().map(|s| (s.tokens.as_slice(), s.marks.as_slice())));
            if batch.scored() == 0 {
                continue;
            }
            // Demonstrations are text as it is: their temperature is 1, whatever rollouts are sampled at.
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
