//! Direct preference optimisation on a fixed set of pairs (Rafailov et al. 2023), with any loss of the family. The
//! reference's log-probabilities of each pair are computed once and cached for later epochs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{Cut, PairTokens, Pairs, PolicyHandle, ReferenceHandle, Tokens};
use rehearsal_lm::Checkpoint;

use super::shared::offline::OfflineSettings;
use super::shared::preference::LossSettings;
use crate::config::{Keys, Settings};
use crate::data::{PairRow, PromptsSettings, Rows};
use crate::driver::{Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, Run, Starter, Stats, Step, Updates};
use crate::error::{Error, Result};
use crate::futures::BoxFuture;
use crate::settings::Common;
use crate::summary::{Evaluation, Seconds};

/// Settings of `dpo`: `[data]`, `[prompts]`, `[loss]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Dpo {
    /// Sections of every offline algorithm.
    pub offline: OfflineSettings,
    /// Loss and β: `[loss]`.
    pub loss: LossSettings,
}

impl Settings for Dpo {
    fn visit(&mut self, keys: &mut Keys) {
        self.offline.visit(keys);
        self.loss.visit(keys);
    }
}

impl AlgorithmSettings for Dpo {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.offline.prompts)
    }

    fn check(&self, _: &Common, keys: &mut Keys) {
        self.offline.check(keys, "dpo");
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let OfflineSettings { data, prompts } = &self.offline;
        let reference = loader.reference()?;
        let rows = loader.rows(data, prompts, |reader| reader.pairs())?;
        if self.loss.preference.needs_scores() && rows.train.iter().any(|r| r.score_gap.is_none()) {
            let message =
                "the loss needs `score_chosen` and `score_rejected` (or `margin`) in every row of `data.train`";
            let file = data.train.first().cloned().unwrap_or_default();
            return Err(Error::Prompts { file, message: message.into() });
        }
        Ok(Box::new(Loaded { settings: self.clone(), policy: loader.policy(), reference, rows }))
    }
}

struct Loaded {
    settings: Dpo,
    policy: Arc<Checkpoint>,
    reference: Arc<Checkpoint>,
    rows: Rows<PairRow>,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let policy = starter.policy(self.policy).await?;
            let reference = starter.reference(self.reference).await?;
            let (settings, rows) = (self.settings, self.rows);
            Ok(Box::new(Running { settings, policy, reference, rows, cache: BTreeMap::new() }) as _)
        })
    }
}

/// Log-probabilities of a pair under the reference, token by token: of the chosen completion, and of the rejected one.
type ReferencePair = (Vec<f32>, Vec<f32>);

struct Running {
    settings: Dpo,
    policy: PolicyHandle,
    reference: ReferenceHandle,
    rows: Rows<PairRow>,
    /// By row.
    cache: BTreeMap<usize, ReferencePair>,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(async move {
            let mut seconds = Seconds::default();
            let drawn = self.settings.offline.draw(run, &self.rows);
            let drawn: Vec<(usize, PairRow)> = drawn.into_iter().map(|(i, row)| (i, row.clone())).collect();
            let stats = Stats::from([("pairs", drawn.len() as f64)]);
            let pairs = self.with_reference(drawn, &mut seconds).await?;
            let objective = Pairs { pairs, loss: self.settings.loss.preference, cut: Cut::Items };
            let report = run.learn(objective, run.learning_rate(), 1.0).await?;
            self.settings.offline.step(run, Updates::one(report), stats, seconds)
        })
    }

    /// Log-probabilities of the held-out pairs, and how often the implicit reward orders them as labelled.
    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(async move {
            let held_out = &self.rows.held_out;
            if held_out.is_empty() {
                return Ok(None);
            }
            let tokens: Vec<Tokens> = held_out.iter().flat_map(|r| [r.chosen.clone(), r.rejected.clone()]).collect();
            let sums = |logprobs: Vec<Vec<f32>>| -> Vec<f64> {
                logprobs.iter().map(|tokens| tokens.iter().map(|&x| f64::from(x)).sum()).collect()
            };
            let policy = sums(self.policy.logprobs(tokens.clone(), 1.0).await?);
            let reference = if self.settings.loss.preference.needs_reference() {
                sums(self.reference.logprobs(tokens, 1.0).await?)
            } else {
                vec![0.0; policy.len()]
            };
            let (n, beta) = (held_out.len() as f64, self.settings.loss.preference.beta);
            let (mut right, mut margin, mut chosen, mut rejected) = (0.0, 0.0, 0.0, 0.0);
            for (p, r) in policy.as_chunks::<2>().0.iter().zip(reference.as_chunks::<2>().0) {
                let gap = beta * ((p[0] - r[0]) - (p[1] - r[1]));
                right += f64::from(gap > 0.0);
                margin += gap;
                chosen += p[0];
                rejected += p[1];
            }
            let stats =
                [("accuracy", right), ("margin", margin), ("chosen_logprob", chosen), ("rejected_logprob", rejected)];
            Ok(Some(Evaluation::of_rows(run.state.step, stats.map(|(name, sum)| (name, sum / n)))))
        })
    }
}

impl Running {
    /// Pairs with the reference's log-probabilities, which are requested where they are not cached.
    async fn with_reference(&mut self, drawn: Vec<(usize, PairRow)>, seconds: &mut Seconds) -> Result<Vec<PairTokens>> {
        let start = Instant::now();
        let needed = self.settings.loss.preference.needs_reference();
        let unknown: Vec<(usize, &PairRow)> =
            drawn.iter().filter(|(i, _)| needed && !self.cache.contains_key(i)).map(|(i, row)| (*i, row)).collect();
        if !unknown.is_empty() {
            let tokens = unknown.iter().flat_map(|(_, row)| [row.chosen.clone(), row.rejected.clone()]).collect();
            let mut logprobs = self.reference.logprobs(tokens, 1.0).await?.into_iter();
            for (i, _) in &unknown {
                if let (Some(chosen), Some(rejected)) = (logprobs.next(), logprobs.next()) {
                    self.cache.insert(*i, (chosen, rejected));
                }
            }
        }
        seconds.reference += start.elapsed().as_secs_f64();
        drawn.into_iter().map(|(i, row)| pair(row, needed.then(|| self.cache.get(&i)), i)).collect()
    }
}

/// A row as a pair; `reference` is `None` for a loss without one.
fn pair(row: PairRow, reference: Option<Option<&ReferencePair>>, index: usize) -> Result<PairTokens> {
    let (ref_chosen, ref_rejected) = match reference {
        None => ReferencePair::default(),
        Some(Some(pair)) => pair.clone(),
        Some(None) => {
            let message = format!("the reference returned no log-probabilities for row {index} of the data");
            return Err(Error::Internal(message));
        }
    };
    let PairRow { chosen, rejected, score_gap } = row;
    Ok(PairTokens {
        chosen,
        rejected,
        sampler_chosen: Vec::new(),
        sampler_rejected: Vec::new(),
        ref_chosen,
        ref_rejected,
        score_gap,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_without_its_reference_is_an_error() {
        let row = || PairRow { chosen: Tokens::default(), rejected: Tokens::default(), score_gap: None };
        assert!(pair(row(), None, 7).unwrap().ref_chosen.is_empty());
        let known = (vec![-1.0], vec![-2.0]);
        assert_eq!(pair(row(), Some(Some(&known)), 7).unwrap().ref_rejected, [-2.0]);
        let error = pair(row(), Some(None), 7).unwrap_err().to_string();
        assert!(error.contains("row 7"), "{error}");
    }
}
