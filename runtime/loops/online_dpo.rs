//! Online DPO (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"): the policy answers
//! each prompt K times, something that knows better scores the answers, the best meets the worst in a preference loss
//! against the reference, and the next answers come from the updated policy.

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{PairTokens, Pairs};
use rehearsal_learn::pairs::{Pair, select_pair};

use super::shared::{
    Updates, advance, answer_held_out, checkpoint_if_due, compared_scores, draw_prompts, entry, generated_tokens,
    pair_stats, pair_tokens, rollout_stats,
};
use crate::error::Result;
use crate::events::{Seconds, StepSummary};
use crate::run::Run;

pub(super) async fn online_dpo(run: &mut Run) -> Result<()> {
    let schedule = run.config.schedule();
    loop {
        // What is due between two steps; a resumed job does what the one before it did not get to.
        answer_held_out(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let (start, mut seconds) = (Instant::now(), Seconds::default());
        let version = run.state.counters.updates;

        // 1. Prompts, and the policy's answers with their scores and reference log-probabilities.
        let prompts = draw_prompts(run);
        let groups = run.rollouts(&prompts, version, &mut seconds).await?;

        // 2. The best meets the worst of each prompt; every comparison goes to the ledger.
        let ties = run.config.loss.ties;
        let pairs: Vec<Option<Pair>> = groups.iter().map(|g| select_pair(&compared_scores(run, g), ties)).collect();
        let entries =
            groups.iter().zip(&pairs).map(|(g, p)| entry(run, &prompts[g.prompt as usize], g, *p, version)).collect();
        run.roles.archivist.log_preferences(entries).await?;

        // 3. One update on the pairs. When all prompts tie there is nothing to learn.
        let tokens: Vec<PairTokens> =
            groups.iter().zip(&pairs).filter_map(|(g, p)| Some(pair_tokens(&prompts, g, (*p)?))).collect();
        let learning_rate = schedule.rate(run.state.step);
        let mut updates = Updates::default();
        if !tokens.is_empty() {
            let objective = Arc::new(Pairs { pairs: tokens, loss: run.config.loss.preference });
            updates.add(run.learn(objective, learning_rate).await?);
        }

        // 4. The step is done: count it and show it.
        seconds.total = start.elapsed().as_secs_f64();
        let mut stats = rollout_stats(&groups);
        stats.extend(pair_stats(&pairs));
        let summary = updates.summary(stats, seconds, learning_rate, version);
        advance(run, StepSummary { generated_tokens: generated_tokens(&groups), ..summary }, prompts.len())?;
    }
}
