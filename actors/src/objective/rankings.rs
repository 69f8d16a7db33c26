//! Reward model training on rankings of the completions of a prompt.

use candle_core::Tensor;
use rehearsal_learn::reward::{PairCount, Pairwise, PairwiseConfig, kwise, pairwise};
use rehearsal_lm::Batch;
use serde::{Deserialize, Serialize};

use super::{Objective, Pass, Portable, length, sum_f64, tensor_like, values_f64};
use crate::passes::scored;
use crate::{Error, Result, Tokens};

/// Completions of one prompt with their ranks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ranking {
    /// Completions with their prompt.
    pub completions: Vec<Tokens>,
    /// One rank per completion: 1 for the best, equal ranks for ties.
    pub ranks: Vec<u32>,
    /// For a pair: by how much the scores should differ at least; `None` for 0.
    pub margin: Option<f64>,
    /// For a pair: the probability that the better-ranked completion is better (soft label); `None` for 1.
    pub probability: Option<f64>,
}

/// The pairwise or k-wise ranking loss on the rankings of one step. The completions of a prompt are in one micro-batch.
///
/// Statistics: `preference_accuracy` (ties count as wrong) and `margin` over the ordered pairs of a ranking,
/// `reward_model_score` over completions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rankings {
    /// Rankings of the step.
    pub rankings: Vec<Ranking>,
    /// Loss of rankings of two.
    pub pairwise: PairwiseConfig,
    /// Number of pairs that the loss of a longer ranking is divided by.
    pub count: PairCount,
}

impl Objective for Rankings {
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
        for (i, r) in self.rankings.iter().enumerate() {
            if r.ranks.len() != r.completions.len() {
                let (n, ranks) = (r.completions.len(), r.ranks.len());
                return Err(Error::Data(format!("ranking {i} of the batch has {n} completions and {ranks} ranks")));
            }
        }
        let whole = self.rankings.len() as f64;
        let size = |r: &Ranking| r.completions.iter().map(length).sum();
        for part in pass.micro_batches(&self.rankings, size) {
            let rankings = part?;
            let model = pass.decoder();
            let batch = Batch::ends(rankings.iter().flat_map(|r| &r.completions).map(|t| scored(model, t)));
            pass.micro_step(
                batch.tokens(),
                |model, _| model.forward_values(&batch),
                |pass, scores| {
                    let mut losses = Vec::new();
                    let (mut winners, mut losers, mut margins) = (Vec::new(), Vec::new(), Vec::new());
                    let mut probabilities = Vec::new();
                    let mut at = 0;
                    for r in rankings {
                        let k = r.completions.len();
                        if let [first, second] = r.ranks[..] {
                            if first != second {
                                let winner = at + u32::from(first > second);
                                winners.push(winner);
                                losers.push(2 * at + 1 - winner);
                                margins.push(r.margin.unwrap_or(0.0) as f32);
                                probabilities.push(r.probability.unwrap_or(1.0) as f32);
                            }
                        } else {
                            let group = scores.narrow(0, at as usize, k)?;
                            losses.extend(kwise(&group, &r.ranks, self.count)?);
                        }
                        add_agreement(pass, &values_f64(&scores.narrow(0, at as usize, k)?.detach())?, &r.ranks);
                        at += k as u32;
                    }
                    if !winners.is_empty() {
                        let pick = |which: Vec<u32>| scores.index_select(&Tensor::new(which, scores.device())?, 0);
                        let (chosen, rejected) = (pick(winners)?, pick(losers)?);
                        let soft = probabilities.iter().any(|p| *p != 1.0);
                        let probability = if soft { Some(tensor_like(probabilities, scores)?) } else { None };
                        let margin = tensor_like(margins, scores)?;
                        let pairs = Pairwise {
                            chosen: &chosen,
                            rejected: &rejected,
                            margin: Some(&margin),
                            probability: probability.as_ref(),
                        };
                        losses.push(pairwise(&pairs, &self.pairwise)?.sum_all()?);
                    }
                    pass.add("reward_model_score", sum_f64(&scores.detach())?, at as usize);
                    // A micro-batch with only ties has a loss and a gradient of zero.
                    let zero = (scores.sum_all()? * 0.0)?;
                    let sum = losses.iter().try_fold(zero, |sum, loss| sum + loss)?;
                    Ok((sum / whole)?)
                },
            )?;
        }
        Ok(())
    }

    fn portable(&self) -> Option<Portable> {
        Some(Portable::Rankings(self.clone()))
    }
}

/// Adds how often, and by what margin, the scores agree with a ranking's pairs.
fn add_agreement(pass: &mut Pass<'_>, scores: &[f64], ranks: &[u32]) {
    for w in 0..scores.len() {
        for l in 0..scores.len() {
            if ranks[w] < ranks[l] {
                pass.add("preference_accuracy", f64::from(scores[w] > scores[l]), 1);
                pass.add("margin", scores[w] - scores[l], 1);
            }
        }
    }
}
