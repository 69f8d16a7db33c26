//! The comparisons of a step's completions, for the preference ledger.

use rehearsal_actors::Group;
use rehearsal_learn::pairs::Pair;
use rehearsal_store::Preference;

use super::collect::Rollouts;
use crate::data::PromptRow;
use crate::driver::run::Run;
use crate::error::Result;
use crate::time::now_ms;

impl Rollouts {
    /// Writes the comparisons of a step's prompts into the preference ledger. `pairs` has one for each group, with the
    /// places of the chosen and the rejected completion in it; `None` for a tie.
    pub async fn log_preferences(
        &self,
        run: &Run,
        prompts: &[PromptRow],
        groups: &[Group],
        pairs: impl IntoIterator<Item = Option<Pair>>,
    ) -> Result<()> {
        let entry = |(group, pair): (&Group, Option<Pair>)| {
            let prompt = &prompts[group.prompt as usize];
            Preference {
                step: run.state.step,
                index: group.prompt,
                row: prompt.row,
                policy_version: group.completions.first().map_or(run.version(), |c| c.policy_version),
                prompt: prompt.prompt.clone(),
                completions: group.completions.iter().map(|c| c.text.clone()).collect(),
                scores: group.completions.iter().map(|c| c.judged.score).collect(),
                reasons: group.completions.iter().map(|c| c.judged.reason.clone()).collect(),
                pair: pair.map(|p| (p.chosen as u32, p.rejected as u32)),
                time_ms: now_ms(),
                judge: self.reward.name().to_string(),
                exchanges: group.completions.iter().flat_map(|c| c.judged.exchanges.iter().cloned()).collect(),
            }
        };
        run.log_preferences(groups.iter().zip(pairs).map(entry).collect()).await
    }
}
