//! Supervised fine-tuning: the first of InstructGPT's three steps (Ouyang et al. 2022, §3.5). The policy learns the
//! assistant's turns of demonstrations.

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{Demonstrations, MaskedSequence};

use super::shared::{Stats, Updates, advance, checkpoint_if_due, evaluation_due};
use crate::data::{Data, Rows};
use crate::error::{Error, Result};
use crate::events::Seconds;
use crate::run::Run;
use crate::state::Evaluation;

pub(super) async fn sft(run: &mut Run) -> Result<()> {
    let schedule = run.config.schedule();
    loop {
        read_held_out(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let start = Instant::now();

        let (seed, n) = (run.config.job.seed, run.config.data.batch_size);
        let drawn = rows(run)?.draw(seed, run.state.cursor, n);
        let sequences = drawn.into_iter().map(|(_, row)| row.clone()).collect();
        let learning_rate = schedule.rate(run.state.step);
        let demonstrations = Demonstrations { sequences, reduction: run.config.sft };
        let report = run.learn(Arc::new(demonstrations), learning_rate).await?;

        let mut updates = Updates::default();
        updates.add(report);
        let seconds = Seconds { total: start.elapsed().as_secs_f64(), ..Seconds::default() };
        let summary = updates.summary(Stats::new(), seconds, learning_rate, 0);
        advance(run, summary, n)?;
    }
}

fn rows(run: &Run) -> Result<&Rows<MaskedSequence>> {
    match &run.data {
        Some(Data::Demonstrations(rows)) => Ok(rows),
        _ => Err(Error::State("fine-tuning was started without demonstrations".into())),
    }
}

/// The negative log-likelihood of a token of the held-out demonstrations.
async fn read_held_out(run: &mut Run) -> Result<()> {
    let held_out = rows(run)?.held_out.clone();
    if !evaluation_due(run) || held_out.is_empty() {
        return Ok(());
    }
    let tokens: usize = held_out.iter().map(MaskedSequence::loss_tokens).sum();
    let sums = run.roles.policy()?.likelihoods(held_out).await?;
    let loss = -sums.iter().sum::<f64>() / tokens.max(1) as f64;
    let stats = [("loss".to_string(), loss)].into();
    run.evaluated(Evaluation { step: run.state.step, stats, samples: Vec::new() })
}
