//! RSO (Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization"): in each round, completions are
//! kept by rejection sampling, which makes them samples of the optimal policy, and paired; then as iterative DPO.

use rehearsal_actors::Group;
use rehearsal_learn::pairs::{Pair, select_pair};
use rehearsal_learn::rso::rejection_sampling;
use rehearsal_lm::random::{Region, Stream};

use super::shared::rounds::{self, InRounds, RoundSettings};
use crate::config::{Keys, Range, Settings};
use crate::data::PromptsSettings;
use crate::driver::{AlgorithmSettings, LoadedAlgorithm, Loader, Run};
use crate::error::Result;
use crate::settings::Common;

/// Settings of `rso`: `[prompts]`, `[rollout]`, `[loss]`, `[update]`, `[rso]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rso {
    /// Sections of every algorithm that learns in rounds.
    pub rounds: RoundSettings,
    /// Candidates of a prompt that rejection sampling keeps.
    pub keep: usize,
    /// Temperature of rejection sampling; above 0.
    pub beta: f64,
}

impl Default for Rso {
    fn default() -> Self {
        Self { rounds: RoundSettings::default(), keep: 8, beta: 0.5 }
    }
}

impl Settings for Rso {
    fn visit(&mut self, keys: &mut Keys) {
        self.rounds.visit(keys);
        let mut s = keys.section("rso");
        let help = "Candidates of a prompt that rejection sampling keeps, of `rollout.completions_per_prompt`.";
        s.integer("keep", &mut self.keep, Range::within(2.0, 256.0), help);
        let help = "Temperature of rejection sampling: towards 0 the best are kept, towards infinity any.";
        s.number("beta", &mut self.beta, Range::above(0.0), help);
    }
}

impl AlgorithmSettings for Rso {
    fn prompts(&self) -> Option<&PromptsSettings> {
        Some(&self.rounds.online.prompts)
    }

    fn check(&self, common: &Common, keys: &mut Keys) {
        let rollout = &self.rounds.online.rollout;
        rollout.check(common, keys);
        let (keep, k) = (self.keep, rollout.completions_per_prompt);
        if keep > k {
            keys.section("rso").problem("keep", format!("= {keep} exceeds `rollout.completions_per_prompt` = {k}"));
        }
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        rounds::load(self, loader)
    }
}

impl InRounds for Rso {
    fn rounds(&self) -> &RoundSettings {
        &self.rounds
    }

    /// Accepted completions in the order of their acceptance: the first is paired with the second and so on, and the better
    /// score is chosen.
    fn pairs(&self, run: &Run, group: &Group) -> Vec<Pair> {
        let RoundSettings { online, loss, .. } = &self.rounds;
        let scores = loss.compared_scores(group);
        let index = run.state.step * online.rollout.prompts_per_step as u64 + u64::from(group.prompt);
        let stream = Stream::in_region(run.common.job.seed, Region::RejectionSampling, index);
        let kept = rejection_sampling(&scores, self.beta, self.keep, |n| stream.uniform(n));
        let label = |two: &[usize; 2]| {
            let pair = select_pair(&[scores[two[0]], scores[two[1]]], loss.ties)?;
            Some(Pair { chosen: two[pair.chosen], rejected: two[pair.rejected], ..pair })
        };
        kept.as_chunks::<2>().0.iter().filter_map(label).collect()
    }
}
