//! From prompts to scored completions: generate, log, score, compare with the reference, buffer.
//!
//! Completions are logged as they finish, and scores before they are used. A step that was cut off is replayed from the
//! log: nothing is generated or scored twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{
    BufferHandle, Group, Judged, PolicyHandle, ReferenceHandle, Replay, RewardHandle, ScoredCompletion,
};
use rehearsal_lm::Checkpoint;
use rehearsal_lm::generate::{Completion, Options, Request, completion_text};
use rehearsal_store::ScoreRecord;
use tokio::sync::mpsc;

use super::completion::{Asked, Generated, from_record, score_records, to_record};
use super::overlap::Overlap;
use super::settings::{RolloutSettings, recorded_tokens};
use crate::data::{PromptRow, Prompts};
use crate::driver::run::Run;
use crate::driver::starter::Starter;
use crate::error::{Error, Result};
use crate::events::{Event, NewCompletion, ScoredText};
use crate::summary::Seconds;

/// What an online algorithm reads before it starts.
pub struct RolloutInputs {
    /// How completions are sampled.
    pub settings: RolloutSettings,
    /// Prompts of the job.
    pub prompts: Prompts,
    /// The start of the policy.
    pub policy: Arc<Checkpoint>,
    /// The reference.
    pub reference: Arc<Checkpoint>,
    /// Whether the first update uses the weights that generated, so that their activations may be recorded.
    pub updates_generator: bool,
}

/// The roles that turn prompts into scored completions.
pub struct Rollouts {
    /// The policy, which generates.
    pub policy: PolicyHandle,
    /// The reference, which computes log-probabilities.
    pub reference: ReferenceHandle,
    /// The job's reward, which scores.
    pub reward: RewardHandle,
    buffer: BufferHandle,
    /// How completions are sampled.
    pub settings: RolloutSettings,
    /// Prompts of the job.
    pub prompts: Prompts,
    pub(super) model: Arc<Checkpoint>,
    /// Tokens of a step's completions whose activations generation records for the update.
    recorded_tokens: usize,
}

/// What the log has of a step.
struct Logged<'a> {
    step: u64,
    policy_version: u64,
    replay: &'a Replay,
}

impl Rollouts {
    /// Starts policy, reference, reward and buffer.
    pub async fn start(inputs: RolloutInputs, starter: &mut Starter<'_>) -> Result<Self> {
        let RolloutInputs { settings, prompts, policy, reference, updates_generator } = inputs;
        let recorded_tokens = recorded_tokens(starter.common, updates_generator);
        Ok(Self {
            policy: starter.policy(policy.clone()).await?,
            reference: starter.reference(reference).await?,
            reward: starter.reward().await?,
            buffer: starter.buffer(settings.completions_per_prompt).await?,
            settings,
            prompts,
            model: policy,
            recorded_tokens,
        })
    }

    /// The prompts of the current step.
    pub fn draw(&self, run: &Run) -> Vec<PromptRow> {
        let (seed, n) = (run.common.job.seed, self.settings.prompts_per_step);
        self.prompts.draw(seed, run.state.cursor, n).into_iter().cloned().collect()
    }

    /// Completions of the current step's prompts, scored and compared with the reference, in the order of the prompts.
    pub async fn collect(&self, run: &mut Run, prompts: &[PromptRow], seconds: &mut Seconds) -> Result<Vec<Group>> {
        let (step, policy_version) = (run.state.step, run.version());
        let asked = Asked { prompts, k: self.settings.completions_per_prompt };
        let first_id = step * self.settings.completions_per_step() as u64;
        let mut replay = run.roles.archivist.replay(step).await?;
        let known = std::mem::take(&mut replay.scores).into_iter().map(|v| {
            let ScoreRecord { index, score, reason, exchanges, skipped, .. } = v;
            (index as usize, Judged { score, reason, exchanges, skipped })
        });
        let mut overlap = self.overlap(run, known.collect());
        let logged = Some(Logged { step, policy_version, replay: &replay });
        let generated = self.generate(run, asked, first_id, logged, &mut overlap, seconds).await?;

        let start = Instant::now();
        self.unless_stopped(run, overlap.finish(asked, &generated)).await?;
        let Overlap { mut judged, mut ref_logprobs, .. } = overlap;
        let unscored: Vec<&Generated> = generated.values().filter(|g| !judged.contains_key(&g.index)).collect();
        for part in unscored.chunks(self.reward.batch().unwrap_or(usize::MAX)) {
            let samples = part.iter().map(|g| g.sample(asked.prompt(g.index))).collect();
            let scores = self.unless_stopped(run, async { Ok(self.reward.score(samples).await?) }).await?;
            let fresh: Vec<(usize, Judged)> = part.iter().map(|g| g.index).zip(scores).collect();
            run.roles.archivist.log_scores(score_records(step, &fresh)).await?;
            judged.extend(fresh);
        }
        seconds.reward += start.elapsed().as_secs_f64();
        for (&index, Judged { reason, .. }) in judged.iter().filter(|(_, judged)| judged.skipped) {
            let row = asked.prompt(index).row;
            run.tell(Event::SampleSkipped { step, index, row, reason: reason.clone() });
        }
        let scored = |g: &Generated| {
            judged.get(&g.index).filter(|j| !j.skipped).map(|Judged { score, reason, .. }| ScoredText {
                index: g.index,
                prompt: asked.prompt(g.index).text.clone(),
                completion: g.text.clone(),
                score: *score,
                reason: reason.clone(),
            })
        };
        run.tell(Event::Scored { step, completions: generated.values().filter_map(scored).collect() });

        let unread: Vec<&Generated> = generated.values().filter(|g| !ref_logprobs.contains_key(&g.index)).collect();
        let read = self.reference_logprobs(asked, &unread, seconds).await?;
        ref_logprobs.extend(unread.iter().map(|g| g.index).zip(read));
        for (index, generated) in generated {
            let prompt = index / asked.k;
            let judged = judged.remove(&index).ok_or_else(|| missing(index, step, "score"))?;
            let ref_logprobs =
                ref_logprobs.remove(&index).ok_or_else(|| missing(index, step, "reference log-probabilities"))?;
            let Generated { completion, text, .. } = generated;
            let scored =
                ScoredCompletion { index: index % asked.k, policy_version, completion, text, judged, ref_logprobs };
            self.buffer.insert(prompt as u32, scored).await?;
        }
        let (mut groups, stale) = self.buffer.take(policy_version).await?;
        run.state.counters.stale += stale as u64;
        run.skipped = leave_out_skipped(&mut groups);
        Ok(groups)
    }

    /// Waits for scores; an error once the job is asked to stop, if the reward may be abandoned.
    async fn unless_stopped<T>(&self, run: &Run, scores: impl Future<Output = Result<T>>) -> Result<T> {
        if !self.reward.may_be_abandoned() {
            return scores.await;
        }
        tokio::select! {
            scores = scores => scores,
            () = run.cancel.cancelled() => Err(rehearsal_actors::Error::Cancelled.into()),
        }
    }

    /// Overlap with the roles that do not share the policy's device.
    fn overlap(&self, run: &Run, judged: BTreeMap<usize, Judged>) -> Overlap {
        let placement = &run.common.placement;
        let reward = (!self.reward.placements().contains(&placement.policy())).then(|| self.reward.clone());
        let reference = (placement.reference() != placement.policy()).then(|| self.reference.clone());
        let archivist = run.roles.archivist.clone();
        Overlap::new(run.state.step, archivist, self.settings.temperature(), reward, reference, judged)
    }

    fn options(&self, run: &Run) -> Options {
        let settings = &self.settings;
        Options {
            sampling: settings.sampling,
            max_new_tokens: settings.max_new_tokens,
            min_new_tokens: settings.min_new_tokens,
            eos: self.model.architecture.eos.clone(),
            stop: settings.stop.clone(),
            seed: run.common.job.seed,
            batch: settings.batch,
        }
    }

    /// Generates the completions that are not in the log, and logs each as it finishes. Meanwhile, scores and reference
    /// log-probabilities are requested through `overlap`.
    async fn generate(
        &self,
        run: &Run,
        asked: Asked<'_>,
        first_id: u64,
        logged: Option<Logged<'_>>,
        overlap: &mut Overlap,
        seconds: &mut Seconds,
    ) -> Result<BTreeMap<usize, Generated>> {
        let start = Instant::now();
        let total = asked.total();
        let mut done: BTreeMap<usize, Generated> = BTreeMap::new();
        if let Some(Logged { replay, .. }) = &logged {
            for rollout in replay.rollouts.iter().filter(|r| (r.index as usize) < total) {
                done.insert(rollout.index as usize, self.generated(rollout.index as usize, from_record(rollout))?);
            }
        }
        let request =
            |index: usize| Request { id: first_id + index as u64, prompt: asked.prompt(index).tokens.clone() };
        let requests: Vec<Request> = (0..total).filter(|i| !done.contains_key(i)).map(request).collect();
        overlap.enqueue(asked, &done, &done.keys().copied().collect::<Vec<_>>());
        if !requests.is_empty() {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            let (policy, options, cancel) = (self.policy.clone(), self.options(run), run.cancel.clone());
            let keep = if logged.is_some() { self.recorded_tokens } else { 0 };
            let generating =
                tokio::spawn(async move { policy.generate(requests, options, keep, sender, cancel).await });
            // An error of a request ends the step only when all completions are there and logged.
            let mut failed = None;
            loop {
                let first = tokio::select! {
                    first = receiver.recv() => first,
                    reply = overlap.next(), if failed.is_none() => {
                        failed = match reply {
                            Ok(reply) => overlap.keep(reply, asked, &done).await.err(),
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
                if let Some(Logged { step, policy_version, .. }) = &logged {
                    let record = |c: &Completion| to_record(c, *step, (c.id - first_id) as u32, *policy_version);
                    run.roles.archivist.log_rollouts(batch.iter().map(record).collect()).await?;
                }
                let new: Vec<usize> = batch.iter().map(|c| (c.id - first_id) as usize).collect();
                for (completion, &index) in batch.into_iter().zip(&new) {
                    done.insert(index, self.generated(index, completion)?);
                }
                if failed.is_none() {
                    overlap.enqueue(asked, &done, &new);
                }
                let completions = new.iter().filter_map(|index| done.get(index)).map(|g| NewCompletion {
                    index: g.index,
                    prompt: asked.prompt(g.index).text.clone(),
                    completion: g.text.clone(),
                    tokens: g.completion.tokens.len(),
                });
                let completions = completions.collect();
                run.tell(Event::Rollout { step: run.state.step, done: done.len(), of: total, completions });
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

    /// One completion of each prompt, not logged, with ids from `first_id`.
    pub(super) async fn generate_once(
        &self,
        run: &Run,
        prompts: &[PromptRow],
        first_id: u64,
    ) -> Result<Vec<Generated>> {
        let asked = Asked { prompts, k: 1 };
        let mut seconds = Seconds::default();
        let generated = self.generate(run, asked, first_id, None, &mut Overlap::none(), &mut seconds).await?;
        Ok(generated.into_values().collect())
    }

    fn generated(&self, index: usize, completion: Completion) -> Result<Generated> {
        let text = completion_text(&self.model.text, &completion.tokens, &self.settings.stop)?;
        Ok(Generated { index, completion, text })
    }

    pub(super) async fn reference_logprobs(
        &self,
        asked: Asked<'_>,
        generated: &[&Generated],
        seconds: &mut Seconds,
    ) -> Result<Vec<Vec<f32>>> {
        if generated.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let tokens = generated.iter().map(|g| g.tokens(asked.prompt(g.index))).collect();
        let logprobs = self.reference.logprobs(tokens, self.settings.temperature()).await?;
        seconds.reference += start.elapsed().as_secs_f64();
        Ok(logprobs)
    }
}

/// Leaves completions without a score out of their groups, and groups that have none left; returns how many were left out.
fn leave_out_skipped(groups: &mut Vec<Group>) -> usize {
    let count = |groups: &[Group]| groups.iter().map(|group| group.completions.len()).sum::<usize>();
    let before = count(groups);
    groups.iter_mut().for_each(|group| group.completions.retain(|c| !c.judged.skipped));
    groups.retain(|group| !group.completions.is_empty());
    before - count(groups)
}

fn missing(index: usize, step: u64, what: &str) -> Error {
    Error::Internal(format!("completion {index} of step {step} has no {what}"))
}
