//! Accuracy of a reward model on labelled pairs, by subset and by section of RewardBench.

use std::collections::BTreeMap;
use std::path::Path;

use rehearsal_actors::{Devices, Placement, Reward, RewardModel, RewardModels, Sample};
use rehearsal_learn::evaluation::rewardbench::{self, Accuracy};
use rehearsal_learn::reward::Ensemble;
use rehearsal_lm::{Checkpoint, Precision};
use serde::Serialize;

use crate::data::{self, LabelledPairs, PairRow};
use crate::error::Result;

/// Accuracy of a reward model.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PairReport {
    /// Number of pairs.
    pub pairs: usize,
    /// Share of pairs whose chosen completion has the strictly higher score.
    pub accuracy: f64,
    /// Number of pairs with equal scores.
    pub ties: usize,
    /// Accuracy on pairs whose chosen completion is the longer one.
    pub accuracy_longer: f64,
    /// Accuracy on the other pairs.
    pub accuracy_shorter: f64,
    /// Share of pairs whose longer completion is chosen: the accuracy of length as a score.
    pub longer_chosen: f64,
    /// Accuracy by the value of the column `subset`.
    pub subsets: BTreeMap<String, f64>,
    /// Accuracy by section of RewardBench, for its subsets.
    pub sections: BTreeMap<String, f64>,
    /// Mean of the sections.
    pub score: Option<f64>,
    /// Number of unusable rows.
    pub dropped: u64,
}

/// Scores all pairs of a file with columns `prompt`, `chosen`, `rejected` and optionally `subset`.
///
/// Computes on the CPU with `threads` threads; 0 uses one for each core.
pub fn reward_model(checkpoint: &Checkpoint, file: &Path, precision: Precision, threads: usize) -> Result<PairReport> {
    let LabelledPairs { pairs: rows, dropped } =
        data::labelled_pairs(file, &checkpoint.text, &checkpoint.architecture)?;
    let devices = Devices::new(threads)?;
    let tokenizer = checkpoint.text.tokenizer_json();
    let model = RewardModel::new("reward model", checkpoint, tokenizer, Placement::Cpu, precision, 8192, &devices)?;
    let models = RewardModels { members: vec![model], ensemble: Ensemble::Mean, clip: None };
    let sample =
        |ids: &rehearsal_actors::Tokens| Sample { tokens: ids.completion.len(), ids: ids.clone(), ..Sample::default() };
    let samples: Vec<Sample> =
        rows.iter().flat_map(|(_, PairRow { chosen, rejected, .. })| [sample(chosen), sample(rejected)]).collect();
    let scores = models.score(&samples).map_err(rehearsal_actors::Error::from)?;
    let (mut all, mut longer, mut shorter) = (Accuracy::default(), Accuracy::default(), Accuracy::default());
    let mut subsets: BTreeMap<String, Accuracy> = BTreeMap::new();
    for ((subset, row), scores) in rows.iter().zip(scores.as_chunks::<2>().0) {
        let (chosen, rejected) = (scores[0].score, scores[1].score);
        all.add(chosen, rejected);
        if row.chosen.completion.len() > row.rejected.completion.len() { &mut longer } else { &mut shorter }
            .add(chosen, rejected);
        if let Some(subset) = subset {
            subsets.entry(subset.clone()).or_default().add(chosen, rejected);
        }
    }
    let subsets: BTreeMap<String, f64> = subsets.into_iter().map(|(name, a)| (name, a.rate())).collect();
    let sections = rewardbench::sections(&subsets);
    Ok(PairReport {
        pairs: all.pairs,
        accuracy: all.rate(),
        ties: all.ties,
        accuracy_longer: longer.rate(),
        accuracy_shorter: shorter.rate(),
        longer_chosen: longer.pairs as f64 / all.pairs.max(1) as f64,
        score: (!sections.is_empty()).then(|| rewardbench::score(&sections)),
        sections: sections.into_iter().map(|(name, x)| (name.to_string(), x)).collect(),
        subsets,
        dropped,
    })
}
