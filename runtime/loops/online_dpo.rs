//! Online DPO (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"): the policy answers
//! each prompt K times, something that knows better scores the answers, the best meets the worst in a DPO loss
//! against the reference, and the next answers come from the updated policy.

use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{Group, PairTokens, ScoredCompletion, StepReport, Tokens, UpdateBatch};
use rehearsal_learn::pairs::{Pair, penalise_missing_eos, select_pair};
use rehearsal_lm::generate::Finish;
use rehearsal_store::Preference;

use crate::error::Result;
use crate::events::{Seconds, StepSummary};
use crate::prompts::PromptRow;
use crate::run::{Run, now_ms};
use crate::state::{Answer, Evaluation};

/// Runs until the last step; an error says why not.
pub(crate) async fn online_dpo(run: &mut Run) -> Result<()> {
    let schedule = run.config.schedule();
    loop {
        // What is due between two steps; a resumed job does what the one before it did not get to.
        evaluate_if_due(run).await?;
        checkpoint_if_due(run).await?;
        if run.state.step >= run.config.job.steps {
            return Ok(());
        }
        run.boundary().await?;
        let start = Instant::now();
        let mut seconds = Seconds::default();
        let version = run.state.counters.updates;

        // 1. Prompts, and the policy's answers with their scores and reference log-probabilities.
        let n = run.config.rollout.prompts_per_step;
        let prompts: Vec<PromptRow> =
            run.prompts.draw(run.config.job.seed, run.state.cursor, n).into_iter().cloned().collect();
        let groups = run.rollouts(&prompts, version, &mut seconds).await?;

        // 2. The best meets the worst of each prompt; every comparison goes to the ledger.
        let pairs: Vec<Option<Pair>> = groups.iter().map(|g| pair(run, g)).collect();
        let entries =
            groups.iter().zip(&pairs).map(|(g, p)| entry(run, &prompts[g.prompt as usize], g, *p, version)).collect();
        run.roles.archivist.log_preferences(entries).await?;

        // 3. One update on the pairs. When all prompts tie there is nothing to learn.
        let tokens: Vec<PairTokens> =
            groups.iter().zip(&pairs).filter_map(|(g, p)| Some(pair_tokens(&prompts, g, (*p)?))).collect();
        let learning_rate = schedule.rate(run.state.step);
        let report = if tokens.is_empty() {
            StepReport { version, ..StepReport::default() }
        } else {
            let temperature = run.config.rollout.sampling.logprob_temperature();
            let batch = UpdateBatch { pairs: tokens, loss: run.config.loss.preference, learning_rate, temperature };
            run.roles.policy.step(batch, run.cancel.clone()).await?
        };

        // 4. The step is done: count it and show it.
        seconds.total = start.elapsed().as_secs_f64();
        let summary = summarise(&groups, &pairs, &report, seconds, learning_rate);
        advance(run, &summary, n);
        run.step_done(StepSummary { step: run.state.step, ..summary })?;
    }
}

async fn checkpoint_if_due(run: &mut Run) -> Result<()> {
    let (step, every) = (run.state.step, run.config.checkpoint.every_steps);
    let due = step > 0 && (step.is_multiple_of(every) || step >= run.config.job.steps);
    if due { run.checkpoint().await } else { Ok(()) }
}

/// Scores of a group as they are compared, and the pair they make.
fn pair(run: &Run, group: &Group) -> Option<Pair> {
    let loss = &run.config.loss;
    let score = |c: &ScoredCompletion| {
        penalise_missing_eos(c.judged.score, c.completion.finish != Finish::Length, loss.missing_eos_penalty)
    };
    let scores: Vec<f64> = group.completions.iter().map(score).collect();
    select_pair(&scores, loss.ties)
}

fn pair_tokens(prompts: &[PromptRow], group: &Group, pair: Pair) -> PairTokens {
    let tokens = |c: &ScoredCompletion| Tokens {
        prompt: prompts[group.prompt as usize].tokens.clone(),
        completion: Arc::new(c.completion.tokens.clone()),
    };
    let (chosen, rejected) = (&group.completions[pair.chosen], &group.completions[pair.rejected]);
    PairTokens {
        chosen: tokens(chosen),
        rejected: tokens(rejected),
        sampler_chosen: chosen.completion.logprobs.clone(),
        sampler_rejected: rejected.completion.logprobs.clone(),
        ref_chosen: chosen.ref_logprobs.clone(),
        ref_rejected: rejected.ref_logprobs.clone(),
    }
}

fn entry(run: &Run, prompt: &PromptRow, group: &Group, pair: Option<Pair>, policy_version: u64) -> Preference {
    Preference {
        step: run.state.step,
        index: group.prompt,
        row: prompt.row,
        policy_version,
        prompt: prompt.prompt.clone(),
        completions: group.completions.iter().map(|c| c.text.clone()).collect(),
        scores: group.completions.iter().map(|c| c.judged.score).collect(),
        reasons: group.completions.iter().map(|c| c.judged.reason.clone()).collect(),
        pair: pair.map(|p| (p.chosen as u32, p.rejected as u32)),
        time_ms: now_ms(),
    }
}

fn advance(run: &mut Run, summary: &StepSummary, prompts: usize) {
    let state = &mut run.state;
    state.step += 1;
    state.cursor += prompts as u64;
    let c = &mut state.counters;
    let completions = prompts * run.config.rollout.completions_per_prompt;
    c.steps += 1;
    c.updates = summary.policy_version;
    c.rollouts += completions as u64;
    c.generated_tokens += summary.generated_tokens as u64;
    c.trained_tokens += summary.trained_tokens as u64;
    c.pairs += summary.pairs as u64;
    c.ties += summary.ties as u64;
    c.truncated += (summary.truncated * completions as f64).round() as u64;
}

/// `Σ_t [log π(y_t) - log π_ref(y_t)]` of one completion.
fn log_ratio(c: &ScoredCompletion) -> f64 {
    c.completion.logprobs.iter().zip(&c.ref_logprobs).map(|(p, r)| f64::from(*p) - f64::from(*r)).sum()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), x| (sum + x, n + 1));
    if n == 0 { 0.0 } else { sum / f64::from(n) }
}

fn summarise(
    groups: &[Group],
    pairs: &[Option<Pair>],
    report: &StepReport,
    seconds: Seconds,
    learning_rate: f64,
) -> StepSummary {
    let all = || groups.iter().flat_map(|g| &g.completions);
    let scores = || all().map(|c| c.judged.score);
    let reward = mean(scores());
    let made: Vec<&Pair> = pairs.iter().flatten().collect();
    let times = &report.times;
    StepSummary {
        step: 0,
        reward,
        reward_std: mean(scores().map(|s| (s - reward).powi(2))).sqrt(),
        reward_min: scores().reduce(f64::min).unwrap_or(0.0),
        reward_max: scores().reduce(f64::max).unwrap_or(0.0),
        kl: mean(all().map(log_ratio)),
        entropy: mean(all().flat_map(|c| &c.completion.logprobs).map(|&p| -f64::from(p))),
        pairs: made.len(),
        ties: pairs.len() - made.len(),
        score_margin: mean(made.iter().map(|p| p.margin)),
        completion_tokens: mean(all().map(|c| c.completion.tokens.len() as f64)),
        truncated: mean(all().map(|c| f64::from(c.completion.finish == Finish::Length))),
        loss: report.loss,
        accuracy: report.accuracy,
        margin: report.margin,
        chosen_reward: report.chosen_reward,
        rejected_reward: report.rejected_reward,
        chosen_logprob: report.chosen_logprob,
        rejected_logprob: report.rejected_logprob,
        grad_norm: report.grad_norm,
        learning_rate,
        mismatch_kl: report.mismatch_kl,
        policy_version: report.version,
        seconds: Seconds {
            forward: times.forward.as_secs_f64(),
            backward: times.backward.as_secs_f64(),
            optimizer: times.optimizer.as_secs_f64(),
            ..seconds
        },
        generated_tokens: all().map(|c| c.completion.tokens.len()).sum(),
        trained_tokens: report.tokens,
    }
}

/// Answers the held-out prompts, each time with the same random numbers: differences are the policy's own.
async fn evaluate_if_due(run: &mut Run) -> Result<()> {
    let (step, every) = (run.state.step, run.config.evaluation.every_steps);
    let due = every > 0 && (step.is_multiple_of(every) || step >= run.config.job.steps);
    let done = run.state.evaluations.last().is_some_and(|e| e.step == step);
    if !due || done || run.prompts.held_out.is_empty() {
        return Ok(());
    }
    let prompts = run.prompts.held_out.clone();
    let answers = run.evaluation_answers(&prompts).await?;
    let shown = answers.iter().take(run.config.evaluation.samples);
    let evaluation = Evaluation {
        step,
        reward: mean(answers.iter().map(|(a, _)| a.judged.score)),
        kl: mean(answers.iter().map(|(a, _)| log_ratio(a))),
        tokens: mean(answers.iter().map(|(a, _)| a.completion.tokens.len() as f64)),
        samples: shown
            .map(|(a, i)| Answer {
                prompt: prompts[*i].text.clone(),
                completion: a.text.clone(),
                score: a.judged.score,
            })
            .collect(),
    };
    run.evaluated(evaluation)
}
