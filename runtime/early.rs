//! What is asked about completions while others are still being generated: scores and reference log-probabilities, where
//! another device answers, a server, or people. What finishes while a question is open goes together into the next.

use std::collections::BTreeMap;
use std::future::{Future, pending};

use rehearsal_actors::{Judged, Tokens};
use tokio::task::JoinHandle;

use crate::data::PromptRow;
use crate::error::Result;
use crate::rollouts::{Answered, log_verdicts, sample, tokens_of};
use crate::run::Run;

type Asking<T> = JoinHandle<rehearsal_actors::Result<Vec<T>>>;

/// Questions about numbered things, one batch at a time.
struct Batches<T> {
    waiting: Vec<usize>,
    /// What was asked, and the answers on their way.
    open: Option<(Vec<usize>, Asking<T>)>,
}

impl<T: Send + 'static> Batches<T> {
    fn new() -> Self {
        Self { waiting: Vec::new(), open: None }
    }

    /// Asks about everything that waits, unless a question is open.
    fn ask<F>(&mut self, question: impl FnOnce(&[usize]) -> F)
    where
        F: Future<Output = rehearsal_actors::Result<Vec<T>>> + Send + 'static,
    {
        if self.open.is_none() && !self.waiting.is_empty() {
            let asked = std::mem::take(&mut self.waiting);
            self.open = Some((asked.clone(), tokio::spawn(question(&asked))));
        }
    }

    /// The answers to the open question; never, if there is none. Nothing is lost when this is dropped before it is done.
    async fn answered(&mut self, role: &'static str) -> Result<Vec<(usize, T)>> {
        let Some((_, task)) = &mut self.open else { return pending().await };
        let answers = task.await;
        let asked = self.open.take().map(|(asked, _)| asked).unwrap_or_default();
        let answers = answers.map_err(|_| rehearsal_actors::Error::Died { role, reason: None })??;
        Ok(asked.into_iter().zip(answers).collect())
    }
}

/// What came back, by the completion's place in the step.
pub(crate) enum Answers {
    Scores(Vec<(usize, Judged)>),
    Reference(Vec<(usize, Vec<f32>)>),
}

/// What a step asks before its completions are all there.
pub(crate) struct Early {
    step: u64,
    scores: Option<Batches<Judged>>,
    reference: Option<Batches<Vec<f32>>>,
    /// Scores that are known, by the completion's place in the step.
    pub judged: BTreeMap<u32, Judged>,
    pub ref_logprobs: BTreeMap<usize, Vec<f32>>,
}

impl Early {
    /// Nothing is asked early.
    pub fn nothing() -> Self {
        let (judged, ref_logprobs) = (BTreeMap::new(), BTreeMap::new());
        Self { step: 0, scores: None, reference: None, judged, ref_logprobs }
    }

    /// For a step of which some verdicts are known: whoever does not share the policy's device is asked early.
    pub fn new(run: &Run, step: u64, judged: BTreeMap<u32, Judged>) -> Result<Self> {
        let placement = &run.config.placement;
        let apart = !run.roles.reward()?.placements().contains(&placement.policy);
        Ok(Self {
            step,
            scores: apart.then(Batches::new),
            reference: (placement.reference != placement.policy).then(Batches::new),
            judged,
            ref_logprobs: BTreeMap::new(),
        })
    }

    /// Takes note of completions that have just come, the last of a prompt's among them: only now can they be compared.
    pub fn came(
        &mut self,
        run: &Run,
        prompts: &[PromptRow],
        k: usize,
        all: &BTreeMap<usize, Answered>,
        new: &[usize],
    ) -> Result<()> {
        if let Some(reference) = &mut self.reference {
            reference.waiting.extend(new);
        }
        if let Some(scores) = &mut self.scores {
            let mut touched: Vec<usize> = new.iter().map(|i| i / k).collect();
            touched.sort_unstable();
            touched.dedup();
            for prompt in touched {
                let group = prompt * k..(prompt + 1) * k;
                if group.clone().all(|i| all.contains_key(&i)) {
                    scores.waiting.extend(group.filter(|&i| !self.judged.contains_key(&(i as u32))));
                }
            }
        }
        self.ask(run, prompts, k, all)
    }

    fn ask(&mut self, run: &Run, prompts: &[PromptRow], k: usize, all: &BTreeMap<usize, Answered>) -> Result<()> {
        let of = |asked: &[usize]| asked.iter().filter_map(|i| all.get(i)).collect::<Vec<_>>();
        if let Some(scores) = &mut self.scores {
            let reward = run.roles.reward()?.clone();
            scores.ask(|asked| {
                let samples = of(asked).into_iter().map(|a| sample(&prompts[a.index / k], a)).collect();
                async move { reward.score(samples).await }
            });
        }
        if let Some(reference) = &mut self.reference {
            let handle = run.roles.reference()?.clone();
            let temperature = run.config.rollout.sampling.logprob_temperature();
            reference.ask(|asked| {
                let tokens: Vec<Tokens> = of(asked).into_iter().map(|a| tokens_of(&prompts[a.index / k], a)).collect();
                async move { handle.logprobs(tokens, temperature).await }
            });
        }
        Ok(())
    }

    /// The next answers, which [`Early::keep`] is to be given. May be dropped before it is done.
    pub async fn next(&mut self) -> Result<Answers> {
        let scores = async {
            match &mut self.scores {
                Some(scores) => scores.answered("reward").await,
                None => pending().await,
            }
        };
        let reference = async {
            match &mut self.reference {
                Some(reference) => reference.answered("reference").await,
                None => pending().await,
            }
        };
        tokio::select! {
            answers = scores => answers.map(Answers::Scores),
            answers = reference => answers.map(Answers::Reference),
        }
    }

    /// Keeps answers, verdicts durably and before anything is done with them, and asks what has waited meanwhile.
    pub async fn keep(
        &mut self,
        answers: Answers,
        run: &Run,
        prompts: &[PromptRow],
        k: usize,
        all: &BTreeMap<usize, Answered>,
    ) -> Result<()> {
        match answers {
            Answers::Scores(scores) => {
                run.roles.archivist.log_scores(log_verdicts(self.step, &scores)).await?;
                self.judged.extend(scores.into_iter().map(|(i, judged)| (i as u32, judged)));
            }
            Answers::Reference(logprobs) => self.ref_logprobs.extend(logprobs),
        }
        self.ask(run, prompts, k, all)
    }

    /// Waits for what is still open.
    pub async fn finish(
        &mut self,
        run: &Run,
        prompts: &[PromptRow],
        k: usize,
        all: &BTreeMap<usize, Answered>,
    ) -> Result<()> {
        let open = |this: &Self| {
            this.scores.as_ref().is_some_and(|b| b.open.is_some())
                || this.reference.as_ref().is_some_and(|b| b.open.is_some())
        };
        while open(self) {
            let answers = self.next().await?;
            self.keep(answers, run, prompts, k, all).await?;
        }
        Ok(())
    }
}
