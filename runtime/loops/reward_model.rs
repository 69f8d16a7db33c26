//! Reward modelling: the second of InstructGPT's three steps (Ouyang et al. 2022, §3.5, eq. 1). A model with a score in
//! the place of its head learns to order completions as people did.

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{Ranking, Rankings, Tokens};
use rehearsal_learn::reward::{Normalisation, PairwiseConfig};

use super::shared::{Stats, Updates, advance, checkpoint_if_due, evaluation_due};
use crate::config::methods::Normalise;
use crate::data::{Data, Rows};
use crate::error::{Error, Result};
use crate::events::Seconds;
use crate::run::Run;
use crate::state::Evaluation;

/// Chosen completions that scores are normalised on, where no demonstrations are named.
const NORMALISED_ON: usize = 256;

pub(super) async fn reward_model(run: &mut Run) -> Result<()> {
    let schedule = run.config.schedule();
    loop {
        judge_held_out(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let start = Instant::now();

        let (seed, n) = (run.config.job.seed, run.config.data.batch_size);
        let drawn = rows(run)?.draw(seed, run.state.cursor, n);
        let rankings = drawn.into_iter().map(|(_, row)| row.clone()).collect();
        let learning_rate = schedule.rate(run.state.step);
        let config = &run.config.reward_model;
        let pairwise = PairwiseConfig { centering: config.centering };
        let objective = Arc::new(Rankings { rankings, pairwise, count: config.count });
        let report = run.learn(objective, learning_rate).await?;

        let mut updates = Updates::default();
        updates.add(report);
        let seconds = Seconds { total: start.elapsed().as_secs_f64(), ..Seconds::default() };
        let summary = updates.summary(Stats::new(), seconds, learning_rate, 0);
        advance(run, summary, n)?;
    }
}

fn rows(run: &Run) -> Result<&Rows<Ranking>> {
    match &run.data {
        Some(Data::Rankings(rows)) => Ok(rows),
        _ => Err(Error::State("a reward model was started without rankings".into())),
    }
}

/// Accuracy on the held-out rankings' pairs: strict, a tie is wrong.
async fn judge_held_out(run: &mut Run) -> Result<()> {
    let held_out = rows(run)?.held_out.clone();
    if !evaluation_due(run) || held_out.is_empty() {
        return Ok(());
    }
    let tokens: Vec<Tokens> = held_out.iter().flat_map(|r| r.completions.iter().cloned()).collect();
    let scores = run.roles.critic()?.scores(tokens).await?;
    let (mut right, mut pairs, mut margin, mut loss, mut at) = (0.0, 0.0, 0.0, 0.0, 0);
    for r in &held_out {
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
    let stats = stats.map(|(name, sum)| (name.to_string(), sum / f64::max(pairs, 1.0))).into();
    run.evaluated(Evaluation { step: run.state.step, stats, samples: Vec::new() })
}

/// What a trained reward model's scores are normalised by, if they are.
pub(crate) async fn finish(run: &Run) -> Result<Option<Normalisation>> {
    let scale = match run.config.reward_model.normalise {
        Normalise::No => return Ok(None),
        Normalise::Mean => false,
        Normalise::MeanAndScale => true,
    };
    let tokens: Vec<Tokens> = if run.pretraining.is_empty() {
        let best = |r: &Ranking| {
            let best = (0..r.ranks.len()).min_by_key(|&i| r.ranks[i])?;
            Some(r.completions[best].clone())
        };
        rows(run)?.train.iter().filter_map(best).take(NORMALISED_ON).collect()
    } else {
        let whole =
            |m: &rehearsal_actors::MaskedSequence| Tokens { prompt: Default::default(), completion: m.tokens.clone() };
        run.pretraining.iter().map(whole).collect()
    };
    let scores = run.roles.critic()?.scores(tokens).await?;
    let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
    Ok(Some(Normalisation::of(&scores, scale)))
}
