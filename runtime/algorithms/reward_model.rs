//! Reward modelling: the second of InstructGPT's three steps (Ouyang et al. 2022, §3.5, eq. 1). A model with a score head
//! learns to order completions as people did.

use std::path::PathBuf;
use std::sync::Arc;

use rehearsal_actors::{CriticHandle, MaskedSequence, Ranking, Rankings, Tokens};
use rehearsal_learn::reward::{Normalisation, PairCount, PairwiseConfig};
use rehearsal_lm::Checkpoint;

use super::shared::offline::OfflineSettings;
use crate::config::{Keys, Range, Settings};
use crate::data::{PromptsSettings, Rows};
use crate::driver::{Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, Run, Starter, Stats, Step, Updates};
use crate::error::Result;
use crate::futures::BoxFuture;
use crate::metrics::Metric;
use crate::settings::Common;
use crate::summary::{Evaluation, Seconds};

/// Chosen completions that scores are normalised on, where no demonstrations are named.
const NORMALISED_ON: usize = 256;

/// The metrics that it alone reports.
const METRICS: &[Metric] =
    &[Metric::gauge("reward_model_score", "score", "Mean score given by the reward model in training.")];

/// How the scores of a trained reward model are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalise {
    /// To a mean of 0.
    Mean,
    /// To a mean of 0 and a standard deviation of 1.
    MeanAndScale,
    /// Not at all.
    No,
}

/// Settings of `reward_model`: `[data]`, `[prompts]`, `[reward_model]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardModel {
    /// Sections of every offline algorithm.
    pub offline: OfflineSettings,
    /// Weight of the mean square of a pair's summed rewards; 0 or more.
    pub centering: f64,
    /// How the pairs of a ranking are weighted.
    pub count: PairCount,
    /// How the trained model's scores are normalised.
    pub normalise: Normalise,
    /// Demonstrations whose mean score is normalised to 0.
    pub demonstrations: Option<PathBuf>,
}

impl Default for RewardModel {
    fn default() -> Self {
        Self {
            offline: OfflineSettings::default(),
            centering: 0.0,
            count: PairCount::All,
            normalise: Normalise::Mean,
            demonstrations: None,
        }
    }
}

impl Settings for RewardModel {
    fn visit(&mut self, keys: &mut Keys) {
        self.offline.visit(keys);
        let mut s = keys.section("reward_model");
        let help = "Weight of the mean square of a pair's summed rewards, which keeps them near 0.";
        s.number("centering", &mut self.centering, Range::from(0.0), help);
        s.choice(
            "pair_count",
            &mut self.count,
            &[("all", PairCount::All), ("untied", PairCount::Untied)],
            "Divisor of a ranking's loss: the number of all its pairs, or of those that do not tie.",
        );
        s.choice(
            "normalise",
            &mut self.normalise,
            &[("mean", Normalise::Mean), ("mean_and_scale", Normalise::MeanAndScale), ("no", Normalise::No)],
            "After training, shift the scores of demonstrations to a mean of 0 (InstructGPT), and scale them to a standard \
             deviation of 1.",
        );
        s.path(
            "demonstrations",
            &mut self.demonstrations,
            "Rows with `prompt` and `completion` to normalise on. Without it, the first 256 chosen completions of `data.train`.",
        );
    }
}

impl AlgorithmSettings for RewardModel {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.offline.prompts)
    }

    fn check(&self, _: &Common, keys: &mut Keys) {
        self.offline.check(keys, "reward_model");
    }

    fn trains_reward_model(&self) -> bool {
        true
    }

    fn metrics(&self) -> &'static [Metric] {
        METRICS
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let OfflineSettings { data, prompts } = &self.offline;
        let rows = loader.rows(data, prompts, |reader| reader.rankings())?;
        let demonstrations = match &self.demonstrations {
            Some(file) => loader.demonstrations(data, prompts, file)?,
            None => Vec::new(),
        };
        Ok(Box::new(Loaded { settings: self.clone(), model: loader.reward_model()?, rows, demonstrations }))
    }
}

struct Loaded {
    settings: RewardModel,
    model: Arc<Checkpoint>,
    rows: Rows<Ranking>,
    demonstrations: Vec<MaskedSequence>,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let Loaded { settings, model, rows, demonstrations } = *self;
            let model = starter.reward_model(model).await?;
            Ok(Box::new(Running { settings, model, rows, demonstrations }) as _)
        })
    }
}

struct Running {
    settings: RewardModel,
    model: CriticHandle,
    rows: Rows<Ranking>,
    demonstrations: Vec<MaskedSequence>,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(async move {
            let drawn = self.settings.offline.draw(run, &self.rows);
            let rankings = drawn.into_iter().map(|(_, row)| row.clone()).collect();
            let pairwise = PairwiseConfig { centering: self.settings.centering };
            let objective = Rankings { rankings, pairwise, count: self.settings.count };
            let report = run.learn(objective, run.learning_rate(), 1.0).await?;
            self.settings.offline.step(run, Updates::one(report), Stats::new(), Seconds::default())
        })
    }

    /// Accuracy on the pairs of the held-out rankings: a tie counts as wrong.
    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(async move {
            let held_out = &self.rows.held_out;
            if held_out.is_empty() {
                return Ok(None);
            }
            let tokens: Vec<Tokens> = held_out.iter().flat_map(|r| r.completions.iter().cloned()).collect();
            let scores = self.model.scores(tokens).await?;
            let (mut right, mut pairs, mut margin, mut loss, mut at) = (0.0, 0.0, 0.0, 0.0, 0);
            for r in held_out {
                let k = r.completions.len();
                let scores = &scores[at..at + k];
                at += k;
                for w in 0..k {
                    for l in (0..k).filter(|&l| r.ranks[w] < r.ranks[l]) {
                        let gap = f64::from(scores[w]) - f64::from(scores[l]);
                        pairs += 1.0;
                        right += f64::from(gap > 0.0);
                        margin += gap;
                        loss += (-gap).max(0.0) + (-gap.abs()).exp().ln_1p();
                    }
                }
            }
            let stats = [("accuracy", right), ("margin", margin), ("loss", loss)];
            let stats = stats.map(|(name, sum)| (name, sum / f64::max(pairs, 1.0)));
            Ok(Some(Evaluation::of_rows(run.state.step, stats)))
        })
    }

    fn normalisation<'a>(&'a mut self, _: &'a mut Run) -> BoxFuture<'a, Result<Option<Normalisation>>> {
        Box::pin(async move {
            let scale = match self.settings.normalise {
                Normalise::No => return Ok(None),
                Normalise::Mean => false,
                Normalise::MeanAndScale => true,
            };
            let tokens: Vec<Tokens> = if self.demonstrations.is_empty() {
                let best = |r: &Ranking| {
                    let best = (0..r.ranks.len()).min_by_key(|&i| r.ranks[i])?;
                    Some(r.completions[best].clone())
                };
                self.rows.train.iter().filter_map(best).take(NORMALISED_ON).collect()
            } else {
                let whole = |m: &MaskedSequence| Tokens { prompt: Default::default(), completion: m.tokens.clone() };
                self.demonstrations.iter().map(whole).collect()
            };
            let scores = self.model.scores(tokens).await?;
            let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
            Ok(Some(Normalisation::of(&scores, scale)))
        })
    }
}
