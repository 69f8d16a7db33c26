//! Overlap of generation with scoring: scores and reference log-probabilities of finished completions are requested while
//! others are still being generated, where another device, a server or people compute them. Each role has one request in
//! flight; completions that finish meanwhile go together into the next one.

use std::collections::BTreeMap;
use std::future::{Future, pending};

use rehearsal_actors::{ArchivistHandle, Judged, ReferenceHandle, RewardHandle, Tokens};
use tokio::task::JoinHandle;

use super::completion::{Asked, Generated, score_records};
use crate::error::Result;

type InFlight<T> = JoinHandle<rehearsal_actors::Result<Vec<T>>>;

/// Requests about numbered completions, one batch at a time.
struct Batches<T> {
    queue: Vec<usize>,
    /// Most completions of a request.
    most: usize,
    /// The completions of the request in flight, and its reply.
    in_flight: Option<(Vec<usize>, InFlight<T>)>,
}

impl<T: Send + 'static> Batches<T> {
    fn new(most: Option<usize>) -> Self {
        Self { queue: Vec::new(), most: most.unwrap_or(usize::MAX), in_flight: None }
    }

    /// Requests what is in the queue, unless a request is in flight.
    fn request<F>(&mut self, send: impl FnOnce(&[usize]) -> F)
    where
        F: Future<Output = rehearsal_actors::Result<Vec<T>>> + Send + 'static,
    {
        if self.in_flight.is_none() && !self.queue.is_empty() {
            let batch: Vec<usize> = self.queue.drain(..self.most.min(self.queue.len())).collect();
            let reply = tokio::spawn(send(&batch));
            self.in_flight = Some((batch, reply));
        }
    }

    /// The reply to the request in flight; pending for ever if there is none. Cancel safe.
    async fn reply(&mut self, role: &'static str) -> Result<Vec<(usize, T)>> {
        let Some((_, task)) = &mut self.in_flight else { return pending().await };
        let reply = task.await;
        let batch = self.in_flight.take().map(|(batch, _)| batch).unwrap_or_default();
        let reply = reply.map_err(|_| rehearsal_actors::Error::Died { role, reason: None })??;
        Ok(batch.into_iter().zip(reply).collect())
    }
}

/// A reply, by the completions' places in the step.
pub enum OverlapReply {
    Scores(Vec<(usize, Judged)>),
    Reference(Vec<(usize, Vec<f32>)>),
}

/// The requests of a step whose completions are not all there yet.
pub struct Overlap {
    step: u64,
    archivist: Option<ArchivistHandle>,
    temperature: f64,
    scores: Option<(RewardHandle, Batches<Judged>)>,
    reference: Option<(ReferenceHandle, Batches<Vec<f32>>)>,
    /// Scores that are known, by the completion's place in the step.
    pub judged: BTreeMap<usize, Judged>,
    /// Reference log-probabilities that are known, by the completion's place in the step.
    pub ref_logprobs: BTreeMap<usize, Vec<f32>>,
}

impl Overlap {
    /// No overlap: nothing is requested before all completions are there.
    pub fn none() -> Self {
        Self {
            step: 0,
            archivist: None,
            temperature: 1.0,
            scores: None,
            reference: None,
            judged: BTreeMap::new(),
            ref_logprobs: BTreeMap::new(),
        }
    }

    /// Overlap for a step of which some scores are known; `reward` and `reference` are given where they do not share the
    /// policy's device.
    pub fn new(
        step: u64,
        archivist: ArchivistHandle,
        temperature: f64,
        reward: Option<RewardHandle>,
        reference: Option<ReferenceHandle>,
        judged: BTreeMap<usize, Judged>,
    ) -> Self {
        Self {
            step,
            archivist: Some(archivist),
            temperature,
            scores: reward.map(|handle| {
                let most = handle.batch();
                (handle, Batches::new(most))
            }),
            reference: reference.map(|handle| (handle, Batches::new(None))),
            judged,
            ref_logprobs: BTreeMap::new(),
        }
    }

    /// Queues completions that have just finished. Scores are requested once all completions of a prompt are there: only
    /// then can they be compared.
    pub fn enqueue(&mut self, asked: Asked<'_>, all: &BTreeMap<usize, Generated>, new: &[usize]) {
        if let Some((_, reference)) = &mut self.reference {
            reference.queue.extend(new);
        }
        if let Some((_, scores)) = &mut self.scores {
            let mut touched: Vec<usize> = new.iter().map(|i| i / asked.k).collect();
            touched.sort_unstable();
            touched.dedup();
            for prompt in touched {
                let group = prompt * asked.k..(prompt + 1) * asked.k;
                if group.clone().all(|i| all.contains_key(&i)) {
                    scores.queue.extend(group.filter(|i| !self.judged.contains_key(i)));
                }
            }
        }
        self.request(asked, all);
    }

    fn request(&mut self, asked: Asked<'_>, all: &BTreeMap<usize, Generated>) {
        let of = |batch: &[usize]| batch.iter().filter_map(|i| all.get(i)).collect::<Vec<_>>();
        if let Some((handle, scores)) = &mut self.scores {
            let reward = handle.clone();
            scores.request(|batch| {
                let samples = of(batch).into_iter().map(|g| g.sample(asked.prompt(g.index))).collect();
                async move { reward.score(samples).await }
            });
        }
        if let Some((handle, reference)) = &mut self.reference {
            let (handle, temperature) = (handle.clone(), self.temperature);
            reference.request(|batch| {
                let tokens: Vec<Tokens> = of(batch).into_iter().map(|g| g.tokens(asked.prompt(g.index))).collect();
                async move { handle.logprobs(tokens, temperature).await }
            });
        }
    }

    /// The next reply, which [`Overlap::keep`] must be given. Cancel safe.
    pub async fn next(&mut self) -> Result<OverlapReply> {
        let scores = async {
            match &mut self.scores {
                Some((_, scores)) => scores.reply("reward").await,
                None => pending().await,
            }
        };
        let reference = async {
            match &mut self.reference {
                Some((_, reference)) => reference.reply("reference").await,
                None => pending().await,
            }
        };
        tokio::select! {
            reply = scores => reply.map(OverlapReply::Scores),
            reply = reference => reply.map(OverlapReply::Reference),
        }
    }

    /// Keeps a reply (scores are logged durably before they are used) and requests what has queued up meanwhile.
    pub async fn keep(
        &mut self,
        reply: OverlapReply,
        asked: Asked<'_>,
        all: &BTreeMap<usize, Generated>,
    ) -> Result<()> {
        match reply {
            OverlapReply::Scores(scores) => {
                if let Some(archivist) = &self.archivist {
                    archivist.log_scores(score_records(self.step, &scores)).await?;
                }
                self.judged.extend(scores);
            }
            OverlapReply::Reference(logprobs) => self.ref_logprobs.extend(logprobs),
        }
        self.request(asked, all);
        Ok(())
    }

    /// Waits for the requests in flight.
    pub async fn finish(&mut self, asked: Asked<'_>, all: &BTreeMap<usize, Generated>) -> Result<()> {
        while self.scores.as_ref().is_some_and(|(_, b)| b.in_flight.is_some())
            || self.reference.as_ref().is_some_and(|(_, b)| b.in_flight.is_some())
        {
            let reply = self.next().await?;
            self.keep(reply, asked, all).await?;
        }
        Ok(())
    }
}
