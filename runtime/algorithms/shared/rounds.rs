//! Rounds of offline learning on the policy's own completions, each from where the last one ended.
//!
//! A round is a step: the reference of a round is the policy at its beginning, so its log-probabilities are taken before
//! the first update and no second copy of the weights is needed.

use std::time::Instant;

use rehearsal_actors::{Cut, Group, PairTokens, Pairs};
use rehearsal_learn::pairs::Pair;

use super::minibatches::{UpdateSettings, minibatches};
use super::online::OnlineSettings;
use super::pairs::{pair_stats, pair_tokens, tokens};
use super::preference::LossSettings;
use crate::config::{Keys, Settings};
use crate::driver::{
    Algorithm, AlgorithmSettings, LoadedAlgorithm, Loader, RolloutInputs, Rollouts, Run, Starter, Step, Updates,
    rollout_stats,
};
use crate::error::{Error, Result};
use crate::futures::BoxFuture;
use crate::summary::{Evaluation, Seconds};

/// Sections of an algorithm that learns in rounds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoundSettings {
    /// Sections of every online algorithm.
    pub online: OnlineSettings,
    /// Loss and β: `[loss]`.
    pub loss: LossSettings,
    /// Epochs and minibatches of a round: `[update]`.
    pub update: UpdateSettings,
}

impl Settings for RoundSettings {
    fn visit(&mut self, keys: &mut Keys) {
        self.online.visit(keys);
        self.loss.visit(keys);
        self.update.visit(keys);
    }
}

/// An algorithm that learns in rounds: how a prompt's completions become pairs.
pub trait InRounds: AlgorithmSettings + Clone {
    /// Sections that all such algorithms have.
    fn rounds(&self) -> &RoundSettings;

    /// The pairs of a prompt.
    fn pairs(&self, run: &Run, group: &Group) -> Vec<Pair>;
}

/// Loads an algorithm that learns in rounds.
pub fn load(settings: &impl InRounds, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
    let inputs = settings.rounds().online.load(loader, false)?;
    loader.rewards()?;
    Ok(Box::new(Loaded { settings: settings.clone(), inputs }))
}

struct Loaded<S> {
    settings: S,
    inputs: RolloutInputs,
}

impl<S: InRounds> LoadedAlgorithm for Loaded<S> {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let rollouts = Rollouts::start(self.inputs, starter).await?;
            Ok(Box::new(Running { settings: self.settings, rollouts }) as _)
        })
    }
}

struct Running<S> {
    settings: S,
    rollouts: Rollouts,
}

impl<S: InRounds> Algorithm for Running<S> {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(round(run, &self.rollouts, &self.settings))
    }

    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(self.rollouts.evaluate(run))
    }
}

/// One round.
async fn round(run: &mut Run, rollouts: &Rollouts, algorithm: &impl InRounds) -> Result<Step> {
    let settings = algorithm.rounds();
    let mut seconds = Seconds::default();
    let (version, learning_rate) = (run.version(), run.learning_rate());
    let temperature = settings.online.rollout.temperature();

    // 1. The round's completions, all from the current policy, with their scores.
    let prompts = rollouts.draw(run);
    let mut groups = rollouts.collect(run, &prompts, &mut seconds).await?;
    let mut stats = rollout_stats(&groups);

    // 2. The pairs of each prompt; every comparison goes into the ledger.
    let chosen: Vec<Vec<Pair>> = groups.iter().map(|g| algorithm.pairs(run, g)).collect();
    let first = chosen.iter().map(|pairs| pairs.first().copied());
    rollouts.log_preferences(run, &prompts, &groups, first).await?;

    // 3. The reference of the round is the policy before its first update. Its log-probabilities are the trainer's, which
    //    on the CPU are the sampler's, to the bit.
    let before = Instant::now();
    let all = groups.iter().flat_map(|g| g.completions.iter().map(|c| tokens(&prompts, g, c))).collect();
    let mut logprobs = rollouts.policy.logprobs(all, temperature).await?.into_iter();
    for completion in groups.iter_mut().flat_map(|g| &mut g.completions) {
        let missing = || Error::Internal("the policy returned fewer log-probabilities than completions".into());
        completion.ref_logprobs = logprobs.next().ok_or_else(missing)?;
    }
    seconds.policy += before.elapsed().as_secs_f64();

    // 4. Epochs of minibatches over the pairs.
    let pairs: Vec<PairTokens> =
        groups.iter().zip(&chosen).flat_map(|(g, pairs)| pairs.iter().map(|p| pair_tokens(&prompts, g, *p))).collect();
    let mut updates = Updates::default();
    for part in minibatches(run.common.job.seed, run.state.step, pairs.len(), settings.update) {
        let pairs = part.into_iter().map(|i| pairs[i].clone()).collect();
        let objective = Pairs { pairs, loss: settings.loss.preference, cut: Cut::Items };
        updates.add(run.learn(objective, learning_rate, temperature).await?);
    }

    let made: Vec<Option<Pair>> = chosen
        .iter()
        .flat_map(|pairs| if pairs.is_empty() { vec![None] } else { pairs.iter().copied().map(Some).collect() })
        .collect();
    stats.extend(pair_stats(&made));
    stats.insert("minibatches", updates.count() as f64);
    let summary = updates.summary(stats, seconds, learning_rate, version);
    Ok(settings.online.step(summary, &groups, prompts.len()))
}
