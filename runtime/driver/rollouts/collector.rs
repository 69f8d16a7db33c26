//! The completions of one step: generate, log, score, compare with the reference.
//!
//! Completions are logged as they finish, and scores before they are used. A step that was cut off is replayed from the
//! log: nothing is generated or scored twice. All that is needed of the job comes in a [`Context`], so a step can be collected
//! beside others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use rehearsal_actors::{
    ArchivistHandle, Judged, ModelSnapshot, Placement, PolicyHandle, ReferenceHandle, Replay, RewardHandle,
    SamplerHandle, ScoredCompletion,
};
use rehearsal_lm::Checkpoint;
use rehearsal_lm::generate::{Completion, Options, Request, completion_text};
use rehearsal_store::ScoreRecord;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::completion::{Asked, Collected, Generated, from_record, score_records, to_record};
use super::overlap::Overlap;
use super::settings::RolloutSettings;
use crate::data::PromptRow;
use crate::driver::run::Run;
use crate::error::{Error, Result};
use crate::events::{Event, NewCompletion, ScoredText, tell};
use crate::nodes::{Coordinator, Generates};
use crate::summary::Seconds;

/// The roles that turn prompts into scored completions.
#[derive(Clone)]
pub struct Collector {
    pub policy: PolicyHandle,
    pub reference: ReferenceHandle,
    pub reward: RewardHandle,
    pub settings: RolloutSettings,
    pub model: Arc<Checkpoint>,
    /// Tokens of a step's completions whose activations generation records for the update.
    pub recorded_tokens: usize,
    /// Other processes that generate completions which are learned from.
    pub nodes: Option<Arc<Coordinator>>,
}

/// Whose weights generate.
#[derive(Clone)]
pub enum Source {
    /// The policy, with those that it has when it is asked.
    Policy,
    /// The sampler, with these.
    Sampler(SamplerHandle, Arc<ModelSnapshot>),
}

/// What collecting a step needs of the job.
#[derive(Clone)]
pub struct Context {
    pub step: u64,
    pub seed: u64,
    /// Version of the weights that generate.
    pub policy_version: u64,
    pub source: Source,
    pub archivist: ArchivistHandle,
    pub cancel: CancellationToken,
    pub events: broadcast::Sender<Event>,
    /// Device that generates, which roles must not share to work meanwhile; `None` if it shares nothing.
    pub occupied: Option<Placement>,
    /// Device of the reference.
    pub reference: Placement,
}

impl Context {
    /// The current step, with the policy's own weights.
    pub fn of(run: &Run) -> Self {
        let placement = &run.common.placement;
        Self {
            step: run.state.step,
            seed: run.common.job.seed,
            policy_version: run.version(),
            source: Source::Policy,
            archivist: run.roles.archivist.clone(),
            cancel: run.cancel.clone(),
            events: run.events.clone(),
            occupied: Some(placement.policy()),
            reference: placement.reference(),
        }
    }

    /// Overlap with the roles that do not share the device that generates.
    fn overlap(&self, collector: &Collector, judged: BTreeMap<usize, Judged>) -> Overlap {
        let apart = |placement: &Placement| Some(*placement) != self.occupied;
        let reward = collector.reward.placements().iter().all(apart).then(|| collector.reward.clone());
        let reference = apart(&self.reference).then(|| collector.reference.clone());
        let temperature = collector.settings.temperature();
        Overlap::new(self.step, self.archivist.clone(), temperature, reward, reference, judged)
    }
}

/// What the log has of a step.
struct Logged {
    step: u64,
    policy_version: u64,
    replay: Replay,
}

impl Collector {
    /// Completions of a step's prompts, scored and compared with the reference, in the order of the prompts.
    pub async fn collect(&self, context: &Context, prompts: &[PromptRow]) -> Result<Collected> {
        let Context { step, policy_version, archivist, .. } = context;
        let (step, policy_version) = (*step, *policy_version);
        let mut seconds = Seconds::default();
        let asked = Asked { prompts, k: self.settings.completions_per_prompt };
        let first_id = step * self.settings.completions_per_step() as u64;
        let mut replay = archivist.replay(step).await?;
        let known = std::mem::take(&mut replay.scores).into_iter().map(|v| {
            let ScoreRecord { index, score, reason, exchanges, skipped, .. } = v;
            (index as usize, Judged { score, reason, exchanges, skipped })
        });
        let mut overlap = context.overlap(self, known.collect());
        let logged = Some(Logged { step, policy_version, replay });
        let generated = self.generate(context, asked, first_id, logged, &mut overlap, &mut seconds).await?;

        let start = Instant::now();
        self.unless_stopped(context, overlap.finish(asked, &generated)).await?;
        let Overlap { mut judged, mut ref_logprobs, .. } = overlap;
        let unscored: Vec<&Generated> = generated.values().filter(|g| !judged.contains_key(&g.index)).collect();
        for part in unscored.chunks(self.reward.batch().unwrap_or(usize::MAX)) {
            let samples = part.iter().map(|g| g.sample(asked.prompt(g.index))).collect();
            let scores = self.unless_stopped(context, async { Ok(self.reward.score(samples).await?) }).await?;
            let fresh: Vec<(usize, Judged)> = part.iter().map(|g| g.index).zip(scores).collect();
            archivist.log_scores(score_records(step, &fresh)).await?;
            judged.extend(fresh);
        }
        seconds.reward += start.elapsed().as_secs_f64();
        for (&index, Judged { reason, .. }) in judged.iter().filter(|(_, judged)| judged.skipped) {
            let row = asked.prompt(index).row;
            tell(&context.events, Event::SampleSkipped { step, index, row, reason: reason.clone() });
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
        let completions = generated.values().filter_map(scored).collect();
        tell(&context.events, Event::Scored { step, completions });

        let unread: Vec<&Generated> = generated.values().filter(|g| !ref_logprobs.contains_key(&g.index)).collect();
        let read = self.reference_logprobs(asked, &unread, &mut seconds).await?;
        ref_logprobs.extend(unread.iter().map(|g| g.index).zip(read));
        let mut completions = Vec::with_capacity(generated.len());
        for (index, generated) in generated {
            let prompt = index / asked.k;
            let judged = judged.remove(&index).ok_or_else(|| missing(index, step, "score"))?;
            let ref_logprobs =
                ref_logprobs.remove(&index).ok_or_else(|| missing(index, step, "reference log-probabilities"))?;
            let Generated { completion, text, .. } = generated;
            let scored =
                ScoredCompletion { index: index % asked.k, policy_version, completion, text, judged, ref_logprobs };
            completions.push((prompt as u32, scored));
        }
        Ok(Collected { completions, seconds })
    }

    /// Waits for scores; an error once the job is asked to stop, if the reward may be abandoned.
    async fn unless_stopped<T>(&self, context: &Context, scores: impl Future<Output = Result<T>>) -> Result<T> {
        if !self.reward.may_be_abandoned() {
            return scores.await;
        }
        tokio::select! {
            scores = scores => scores,
            () = context.cancel.cancelled() => Err(rehearsal_actors::Error::Cancelled.into()),
        }
    }

    fn options(&self, seed: u64) -> Options {
        let settings = &self.settings;
        Options {
            sampling: settings.sampling,
            max_new_tokens: settings.max_new_tokens,
            min_new_tokens: settings.min_new_tokens,
            eos: self.model.architecture.eos.clone(),
            stop: settings.stop.clone(),
            seed,
            batch: settings.batch,
        }
    }

    /// Generates the completions that are not in the log, and logs each as it finishes. Meanwhile, scores and reference
    /// log-probabilities are requested through `overlap`.
    async fn generate(
        &self,
        context: &Context,
        asked: Asked<'_>,
        first_id: u64,
        logged: Option<Logged>,
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
            let (policy, options, cancel) = (self.policy.clone(), self.options(context.seed), context.cancel.clone());
            let keep = if logged.is_some() { self.recorded_tokens } else { 0 };
            let role = if let Source::Policy = context.source { "policy" } else { "sampler" };
            let nodes = self.nodes.clone().filter(|_| logged.is_some());
            let here: Generates = match context.source.clone() {
                Source::Policy => {
                    let options = options.clone();
                    Arc::new(move |requests, sender, cancel| {
                        let (policy, options) = (policy.clone(), options.clone());
                        Box::pin(
                            async move { policy.generate(requests, options, keep, sender, cancel).await.map(drop) },
                        )
                    })
                }
                Source::Sampler(sampler, weights) => {
                    let options = options.clone();
                    Arc::new(move |requests, sender, cancel| {
                        let (sampler, weights, options) = (sampler.clone(), weights.clone(), options.clone());
                        Box::pin(async move { sampler.generate(weights, requests, options, sender, cancel).await })
                    })
                }
            };
            let generating = match nodes {
                None => tokio::spawn(async move { Ok(here(requests, sender, cancel).await?) }),
                Some(nodes) => {
                    let weights = match &context.source {
                        Source::Policy => Arc::new(self.policy.weights().await?),
                        Source::Sampler(_, weights) => weights.clone(),
                    };
                    tokio::spawn(
                        async move { nodes.generate(weights, requests, options, &here, sender, &cancel).await },
                    )
                }
            };
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
                    context.archivist.log_rollouts(batch.iter().map(record).collect()).await?;
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
                tell(&context.events, Event::Rollout { step: context.step, done: done.len(), of: total, completions });
            }
            let lost = |_| rehearsal_actors::Error::Died { role, reason: None };
            generating.await.map_err(lost)??;
            if let Some(error) = failed {
                return Err(error);
            }
        }
        seconds.generate += start.elapsed().as_secs_f64();
        Ok(done)
    }

    /// One completion of each prompt, not logged, with ids from `first_id`.
    pub async fn generate_once(
        &self,
        context: &Context,
        prompts: &[PromptRow],
        first_id: u64,
    ) -> Result<Vec<Generated>> {
        let asked = Asked { prompts, k: 1 };
        let mut seconds = Seconds::default();
        let generated = self.generate(context, asked, first_id, None, &mut Overlap::none(), &mut seconds).await?;
        Ok(generated.into_values().collect())
    }

    fn generated(&self, index: usize, completion: Completion) -> Result<Generated> {
        let text = completion_text(&self.model.text, &completion.tokens, &self.settings.stop)?;
        Ok(Generated { index, completion, text })
    }

    pub async fn reference_logprobs(
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

fn missing(index: usize, step: u64, what: &str) -> Error {
    Error::Internal(format!("completion {index} of step {step} has no {what}"))
}
