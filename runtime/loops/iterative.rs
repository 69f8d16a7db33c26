//! Rounds of offline learning on the policy's own completions, each from where the last one ended.
//!
//! Iterative DPO (Xu et al. 2023; Yuan et al. 2024): sample K completions a prompt, let the best meet the worst, and
//! learn from the pairs against the policy that sampled them. RSO (Liu et al. 2023) keeps completions by statistical
//! rejection sampling, which makes them samples of the optimal policy, and pairs those.
//!
//! A round is a step: the reference of a round is the policy at its beginning, so its log-probabilities are taken before
//! the first update and no second copy of the weights is needed.

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{Group, PairTokens, Pairs};
use rehearsal_learn::pairs::{Pair, select_pair};
use rehearsal_learn::rso::rejection_sampling;
use rehearsal_lm::random::Stream;

use super::round::minibatches;
use super::shared::{
    Updates, advance, answer_held_out, checkpoint_if_due, compared_scores, draw_prompts, entry, generated_tokens,
    pair_stats, pair_tokens, rollout_stats,
};
use crate::error::Result;
use crate::events::{Seconds, StepSummary};
use crate::run::Run;

/// Streams of random numbers of rejection sampling, above those of minibatches.
const REJECTION_STREAMS: u64 = (1 << 63) + (1 << 62) + (1 << 61);

/// The best against the worst.
pub(super) async fn iterative_dpo(run: &mut Run) -> Result<()> {
    rounds(run, |run, group| {
        let pair = select_pair(&compared_scores(run, group), run.config.loss.ties);
        pair.into_iter().collect()
    })
    .await
}

/// Accepted completions in the order of their acceptance, the first against the second and so on, labelled by score.
pub(super) async fn rso(run: &mut Run) -> Result<()> {
    rounds(run, |run, group| {
        let scores = compared_scores(run, group);
        let address = run.state.step * run.config.rollout.prompts_per_step as u64 + u64::from(group.prompt);
        let stream = Stream::new(run.config.job.seed, REJECTION_STREAMS + address);
        let kept = rejection_sampling(&scores, run.config.rso.beta, run.config.rso.keep, |n| stream.uniform(n));
        let label = |two: &[usize; 2]| {
            let pair = select_pair(&[scores[two[0]], scores[two[1]]], run.config.loss.ties)?;
            Some(Pair { chosen: two[pair.chosen], rejected: two[pair.rejected], ..pair })
        };
        kept.as_chunks::<2>().0.iter().filter_map(label).collect()
    })
    .await
}

async fn rounds(run: &mut Run, choose: impl Fn(&Run, &Group) -> Vec<Pair>) -> Result<()> {
    let schedule = run.config.schedule();
    loop {
        answer_held_out(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let (start, mut seconds) = (Instant::now(), Seconds::default());
        let version = run.state.counters.updates;

        // 1. The round's completions, all from the policy as it is now, with their scores.
        let prompts = draw_prompts(run);
        let mut groups = run.rollouts(&prompts, version, &mut seconds).await?;
        let stats = rollout_stats(&groups);

        // 2. The pairs of each prompt; every comparison goes to the ledger.
        let chosen: Vec<Vec<Pair>> = groups.iter().map(|g| choose(run, g)).collect();
        let entries = groups
            .iter()
            .zip(&chosen)
            .map(|(g, pairs)| entry(run, &prompts[g.prompt as usize], g, pairs.first().copied(), version))
            .collect();
        run.roles.archivist.log_preferences(entries).await?;

        // 3. The reference of the round is the policy before its first update: what the sampler said, where both are
        //    the same bits; what the trainer says, everywhere.
        let before = Instant::now();
        let tokens = groups.iter().flat_map(|g| g.completions.iter().map(|c| super::shared::tokens(&prompts, g, c)));
        let temperature = run.config.rollout.sampling.logprob_temperature();
        let mut said = run.roles.policy()?.logprobs(tokens.collect(), temperature).await?.into_iter();
        for completion in groups.iter_mut().flat_map(|g| &mut g.completions) {
            completion.ref_logprobs = said.next().unwrap_or_default();
        }
        seconds.reference += before.elapsed().as_secs_f64();

        // 4. Epochs of minibatches over the pairs.
        let pairs: Vec<PairTokens> = groups
            .iter()
            .zip(&chosen)
            .flat_map(|(g, pairs)| pairs.iter().map(|p| pair_tokens(&prompts, g, *p)))
            .collect();
        let learning_rate = schedule.rate(run.state.step);
        let mut updates = Updates::default();
        for part in minibatches(run.config.job.seed, run.state.step, pairs.len(), run.config.update) {
            let pairs = part.into_iter().map(|i| pairs[i].clone()).collect();
            let objective = Arc::new(Pairs { pairs, loss: run.config.loss.preference });
            updates.add(run.learn(objective, learning_rate).await?);
        }

        seconds.total = start.elapsed().as_secs_f64();
        let mut stats = stats;
        let made: Vec<Option<Pair>> = chosen
            .iter()
            .flat_map(|pairs| if pairs.is_empty() { vec![None] } else { pairs.iter().copied().map(Some).collect() })
            .collect();
        stats.extend(pair_stats(&made));
        stats.insert("minibatches", updates.len() as f64);
        let summary = updates.summary(stats, seconds, learning_rate, version);
        advance(run, StepSummary { generated_tokens: generated_tokens(&groups), ..summary }, prompts.len())?;
    }
}
