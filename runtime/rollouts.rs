//! From prompts to scored completions: generate, log, score, compare with the reference, buffer. Whoever does not share the
//! policy's device is asked about a completion while others are still being generated ([`crate::early`]).
//!
//! Completions are logged as they finish and verdicts before anything is done with them, so a step that is cut off
//! is replayed from the log and never generated or judged twice.

use std::collections::BTreeMap;
use std::time::Instant;

use rehearsal_actors::{Group, Judged, Replay, Sample, ScoredCompletion, Tokens};
use rehearsal_lm::generate::{Completion, Finish, Request, completion_text};
use rehearsal_store::{RolloutRecord, ScoreRecord};
use tokio::sync::mpsc;

use crate::data::PromptRow;
use crate::early::Early;
use crate::error::Result;
use crate::events::{Event, Seconds};
use crate::run::Run;

/// Rollout ids from here upward belong to evaluations, which draw the same numbers each time.
pub(crate) const EVALUATION_IDS: u64 = 1 << 62;

/// A completion on its way, with the prompt it answers.
pub(crate) struct Answered {
    pub index: usize,
    pub completion: Completion,
    text: String,
}

impl Run {
    /// Completions of a step's prompts, scored and compared with the reference, in the order of the prompts.
    pub async fn rollouts(
        &mut self,
        prompts: &[PromptRow],
        policy_version: u64,
        seconds: &mut Seconds,
    ) -> Result<Vec<Group>> {
        let step = self.state.step;
        let k = self.config.rollout.completions_per_prompt;
        let first_id = step * self.config.completions_per_step() as u64;
        let mut replay = self.roles.archivist.replay(step).await?;
        let known = std::mem::take(&mut replay.scores).into_iter().map(|v| {
            let ScoreRecord { index, score, reason, exchanges, .. } = v;
            (index, Judged { score, reason, exchanges })
        });
        let mut early = Early::new(self, step, known.collect())?;
        let logged = Some((step, policy_version, &replay));
        let answered = self.answers(prompts, k, first_id, logged, &mut early, seconds).await?;

        let start = Instant::now();
        early.finish(self, prompts, k, &answered).await?;
        let Early { mut judged, mut ref_logprobs, .. } = early;
        let unknown: Vec<&Answered> = answered.values().filter(|a| !judged.contains_key(&(a.index as u32))).collect();
        if !unknown.is_empty() {
            let samples = unknown.iter().map(|a| sample(&prompts[a.index / k], a)).collect();
            let scores = self.roles.reward()?.score(samples).await?;
            let fresh: Vec<(usize, Judged)> = unknown.iter().map(|a| a.index).zip(scores).collect();
            self.roles.archivist.log_scores(log_verdicts(step, &fresh)).await?;
            judged.extend(fresh.into_iter().map(|(i, j)| (i as u32, j)));
        }
        seconds.reward += start.elapsed().as_secs_f64();

        let unread: Vec<&Answered> = answered.values().filter(|a| !ref_logprobs.contains_key(&a.index)).collect();
        let read = self.reference_logprobs(prompts, k, &unread, seconds).await?;
        ref_logprobs.extend(unread.iter().map(|a| a.index).zip(read));
        for (index, answered) in answered {
            let (prompt, in_group) = (index / k, index % k);
            let (Some(judged), Some(ref_logprobs)) = (judged.remove(&(index as u32)), ref_logprobs.remove(&index))
            else {
                continue;
            };
            let Answered { completion, text, .. } = answered;
            let scored = ScoredCompletion { index: in_group, policy_version, completion, text, judged, ref_logprobs };
            self.roles.buffer()?.insert(prompt as u32, scored).await?;
        }
        let (groups, stale) = self.roles.buffer()?.take(policy_version).await?;
        self.state.counters.stale += stale as u64;
        Ok(groups)
    }

    /// Answers to evaluation prompts: one each, scored, with log-probabilities under the reference.
    pub async fn evaluation_answers(&mut self, prompts: &[PromptRow]) -> Result<Vec<(ScoredCompletion, usize)>> {
        let mut seconds = Seconds::default();
        let answered = self.answers(prompts, 1, EVALUATION_IDS, None, &mut Early::nothing(), &mut seconds).await?;
        let answered: Vec<Answered> = answered.into_values().collect();
        let judged = self.judge_evaluation(prompts, &answered).await?;
        let all: Vec<&Answered> = answered.iter().collect();
        let ref_logprobs = self.reference_logprobs(prompts, 1, &all, &mut seconds).await?;
        let all = answered.into_iter().zip(judged).zip(ref_logprobs);
        Ok(all
            .map(|((a, judged), ref_logprobs)| {
                let Answered { index, completion, text } = a;
                (ScoredCompletion { index: 0, policy_version: 0, completion, text, judged, ref_logprobs }, index)
            })
            .collect())
    }

    /// Scores of evaluation answers. A reward that can only compare is shown each beside the first answer to its prompt:
    /// its score is then the share of wins against the model as it was.
    async fn judge_evaluation(&mut self, prompts: &[PromptRow], answered: &[Answered]) -> Result<Vec<Judged>> {
        let reward = self.roles.reward()?.clone();
        let samples: Vec<Sample> = answered.iter().map(|a| sample(&prompts[a.index], a)).collect();
        if !reward.is_relative() {
            return Ok(reward.score(samples).await?);
        }
        let tokens = |a: &Answered| a.completion.tokens.clone();
        if self.state.first_answers.len() != answered.len() {
            self.state.first_answers = answered.iter().map(tokens).collect();
        }
        let mut both = Vec::with_capacity(2 * samples.len());
        for (first, sample) in self.state.first_answers.iter().zip(samples) {
            let completion = completion_text(&self.model.text, first, &self.config.rollout.stop)?;
            let ids = Tokens { completion: first.clone().into(), ..sample.ids.clone() };
            let ended = first.last().is_some_and(|t| self.model.architecture.eos.contains(t));
            let finish = if ended { Finish::Eos } else { Finish::Length };
            both.push(Sample { completion, tokens: first.len(), ids, finish, ..sample.clone() });
            both.push(sample);
        }
        Ok(reward.score(both).await?.into_iter().skip(1).step_by(2).collect())
    }

    /// Generates what the log does not have, logging each completion as it finishes, and meanwhile asks `early` about
    /// those that have.
    async fn answers(
        &mut self,
        prompts: &[PromptRow],
        k: usize,
        first_id: u64,
        logged: Option<(u64, u64, &Replay)>,
        early: &mut Early,
        seconds: &mut Seconds,
    ) -> Result<BTreeMap<usize, Answered>> {
        let start = Instant::now();
        let total = prompts.len() * k;
        let mut done: BTreeMap<usize, Answered> = BTreeMap::new();
        if let Some((_, _, replay)) = logged {
            for rollout in replay.rollouts.iter().filter(|r| (r.index as usize) < total) {
                done.insert(rollout.index as usize, self.answered(rollout.index as usize, from_log(rollout))?);
            }
        }
        let request = |index: usize| Request { id: first_id + index as u64, prompt: prompts[index / k].tokens.clone() };
        let requests: Vec<Request> = (0..total).filter(|i| !done.contains_key(i)).map(request).collect();
        early.came(self, prompts, k, &done, &done.keys().copied().collect::<Vec<_>>())?;
        if !requests.is_empty() {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            let (policy, options, cancel) = (self.roles.policy()?.clone(), self.generation(), self.cancel.clone());
            let keep = if logged.is_some() { self.config.kept_tokens() } else { 0 };
            let generating =
                tokio::spawn(async move { policy.generate(requests, options, keep, sender, cancel).await });
            // What goes wrong early ends the step only when all completions are there and logged.
            let mut failed = None;
            loop {
                let first = tokio::select! {
                    first = receiver.recv() => first,
                    answers = early.next(), if failed.is_none() => {
                        failed = match answers {
                            Ok(answers) => early.keep(answers, self, prompts, k, &done).await.err(),
                            Err(error) => Some(error),
                        };
                        continue;
                    }
                };
                let Some(first) = first else { break };
                let mut batch = vec![first];
                while let Ok(next) = receiver.try_recv() {
                    batch.push(next);
                }
                if let Some((step, policy_version, _)) = logged {
                    let row = |c: &Completion| to_log(c, step, (c.id - first_id) as u32, policy_version);
                    self.roles.archivist.log_rollouts(batch.iter().map(row).collect()).await?;
                }
                let new: Vec<usize> = batch.iter().map(|c| (c.id - first_id) as usize).collect();
                for (completion, &index) in batch.into_iter().zip(&new) {
                    done.insert(index, self.answered(index, completion)?);
                }
                if failed.is_none() {
                    early.came(self, prompts, k, &done, &new)?;
                }
                self.tell(Event::Rollout { step: self.state.step, done: done.len(), of: total });
            }
            let lost = |_| rehearsal_actors::Error::Died { role: "policy", reason: None };
            generating.await.map_err(lost)??;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        seconds.generate += start.elapsed().as_secs_f64();
        Ok(done)
    }

    fn answered(&self, index: usize, completion: Completion) -> Result<Answered> {
        let text = completion_text(&self.model.text, &completion.tokens, &self.config.rollout.stop)?;
        Ok(Answered { index, completion, text })
    }

    async fn reference_logprobs(
        &self,
        prompts: &[PromptRow],
        k: usize,
        answered: &[&Answered],
        seconds: &mut Seconds,
    ) -> Result<Vec<Vec<f32>>> {
        if answered.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let tokens = answered.iter().map(|a| tokens_of(&prompts[a.index / k], a)).collect();
        let temperature = self.config.rollout.sampling.logprob_temperature();
        let logprobs = self.roles.reference()?.logprobs(tokens, temperature).await?;
        seconds.reference += start.elapsed().as_secs_f64();
        Ok(logprobs)
    }
}

/// A completion after its prompt.
pub(crate) fn tokens_of(prompt: &PromptRow, answered: &Answered) -> Tokens {
    Tokens { prompt: prompt.tokens.clone(), completion: answered.completion.tokens.clone().into() }
}

/// Scores of a step's completions as the log keeps them.
pub(crate) fn log_verdicts(step: u64, judged: &[(usize, Judged)]) -> Vec<ScoreRecord> {
    let verdict = |(index, judged): &(usize, Judged)| {
        let Judged { score, reason, exchanges } = judged.clone();
        ScoreRecord { step, index: *index as u32, score, reason, exchanges }
    };
    judged.iter().map(verdict).collect()
}

/// A completion as a reward reads it.
pub(crate) fn sample(prompt: &PromptRow, answered: &Answered) -> Sample {
    Sample {
        prompt: prompt.text.clone(),
        messages: prompt.messages.clone(),
        completion: answered.text.clone(),
        tokens: answered.completion.tokens.len(),
        ids: tokens_of(prompt, answered),
        finish: answered.completion.finish,
        answer: prompt.answer.clone(),
        row: prompt.row,
    }
}

const FINISHES: [Finish; 3] = [Finish::Eos, Finish::Stop, Finish::Length];

fn to_log(c: &Completion, step: u64, index: u32, policy_version: u64) -> RolloutRecord {
    let finish = FINISHES.iter().position(|f| *f == c.finish).unwrap_or_default() as u8;
    RolloutRecord {
        step,
        index,
        id: c.id,
        policy_version,
        tokens: c.tokens.clone(),
        logprobs: c.logprobs.clone(),
        finish,
    }
}

fn from_log(r: &RolloutRecord) -> Completion {
    let finish = FINISHES.get(r.finish as usize).copied().unwrap_or(Finish::Length);
    Completion { id: r.id, tokens: r.tokens.clone(), logprobs: r.logprobs.clone(), finish }
}
