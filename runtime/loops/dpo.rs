//! Direct preference optimisation on a fixed set of pairs (Rafailov et al. 2023), with any loss of the family. The
//! reference is asked about each pair once; later epochs remember.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{PairTokens, Pairs, Tokens};

use super::shared::{Stats, Updates, advance, checkpoint_if_due, evaluation_due};
use crate::data::{Data, PairRow, Rows};
use crate::error::{Error, Result};
use crate::events::Seconds;
use crate::run::Run;
use crate::state::Evaluation;

/// Log-probabilities under the reference, token by token, by row.
type Remembered = BTreeMap<usize, (Vec<f32>, Vec<f32>)>;

pub(super) async fn dpo(run: &mut Run) -> Result<()> {
    let schedule = run.config.schedule();
    if run.config.loss.preference.needs_scores() && rows(run)?.train.iter().any(|r| r.score_gap.is_none()) {
        let message = "the loss needs `score_chosen` and `score_rejected` (or `margin`) in every row of `data.train`";
        return Err(Error::State(message.into()));
    }
    let mut remembered = Remembered::new();
    loop {
        compare_held_out(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let (start, mut seconds) = (Instant::now(), Seconds::default());

        let (seed, n) = (run.config.job.seed, run.config.data.batch_size);
        let drawn: Vec<(usize, PairRow)> =
            rows(run)?.draw(seed, run.state.cursor, n).into_iter().map(|(i, row)| (i, row.clone())).collect();
        let pairs = with_reference(run, drawn, &mut remembered, &mut seconds).await?;
        let learning_rate = schedule.rate(run.state.step);
        let objective = Arc::new(Pairs { pairs, loss: run.config.loss.preference });
        let mut updates = Updates::default();
        updates.add(run.learn(objective, learning_rate).await?);

        seconds.total = start.elapsed().as_secs_f64();
        let stats = Stats::from([("pairs", n as f64)]);
        let summary = updates.summary(stats, seconds, learning_rate, 0);
        advance(run, summary, n)?;
    }
}

fn rows(run: &Run) -> Result<&Rows<PairRow>> {
    match &run.data {
        Some(Data::Pairs(rows)) => Ok(rows),
        _ => Err(Error::State("DPO was started without pairs".into())),
    }
}

/// Rows with what the reference says of them, asked for where it is not remembered.
async fn with_reference(
    run: &Run,
    drawn: Vec<(usize, PairRow)>,
    remembered: &mut Remembered,
    seconds: &mut Seconds,
) -> Result<Vec<PairTokens>> {
    let start = Instant::now();
    let asked: Vec<(usize, &PairRow)> =
        drawn.iter().filter(|(i, _)| !remembered.contains_key(i)).map(|(i, row)| (*i, row)).collect();
    if run.config.loss.preference.needs_reference() && !asked.is_empty() {
        let tokens = asked.iter().flat_map(|(_, row)| [row.chosen.clone(), row.rejected.clone()]).collect();
        let mut said = run.roles.reference()?.logprobs(tokens, 1.0).await?.into_iter();
        for (i, _) in &asked {
            if let (Some(chosen), Some(rejected)) = (said.next(), said.next()) {
                remembered.insert(*i, (chosen, rejected));
            }
        }
    }
    seconds.reference += start.elapsed().as_secs_f64();
    let pair = |(i, row): (usize, PairRow)| {
        let (ref_chosen, ref_rejected) = remembered.get(&i).cloned().unwrap_or_default();
        let PairRow { chosen, rejected, score_gap } = row;
        PairTokens {
            chosen,
            rejected,
            sampler_chosen: Vec::new(),
            sampler_rejected: Vec::new(),
            ref_chosen,
            ref_rejected,
            score_gap,
        }
    };
    Ok(drawn.into_iter().map(pair).collect())
}

/// Log-probabilities of the held-out pairs, and how often the implicit reward orders them as labelled.
async fn compare_held_out(run: &mut Run) -> Result<()> {
    let held_out = rows(run)?.held_out.clone();
    if !evaluation_due(run) || held_out.is_empty() {
        return Ok(());
    }
    let tokens: Vec<Tokens> = held_out.iter().flat_map(|r| [r.chosen.clone(), r.rejected.clone()]).collect();
    let sums = |said: Vec<Vec<f32>>| -> Vec<f64> {
        said.iter().map(|tokens| tokens.iter().map(|&x| f64::from(x)).sum()).collect()
    };
    let policy = sums(run.roles.policy()?.logprobs(tokens.clone(), 1.0).await?);
    let reference = if run.config.loss.preference.needs_reference() {
        sums(run.roles.reference()?.logprobs(tokens, 1.0).await?)
    } else {
        vec![0.0; policy.len()]
    };
    let (n, beta) = (held_out.len() as f64, run.config.loss.preference.beta);
    let (mut right, mut margin, mut chosen, mut rejected) = (0.0, 0.0, 0.0, 0.0);
    for (p, r) in policy.as_chunks::<2>().0.iter().zip(reference.as_chunks::<2>().0) {
        let gap = beta * ((p[0] - r[0]) - (p[1] - r[1]));
        right += f64::from(gap > 0.0);
        margin += gap;
        chosen += p[0];
        rejected += p[1];
    }
    let stats = [("accuracy", right), ("margin", margin), ("chosen_logprob", chosen), ("rejected_logprob", rejected)];
    let stats = stats.map(|(name, sum)| (name.to_string(), sum / n)).into();
    run.evaluated(Evaluation { step: run.state.step, stats, samples: Vec::new() })
}
