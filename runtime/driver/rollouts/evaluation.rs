//! Evaluation of an online algorithm: the policy answers the held-out prompts.

use rehearsal_actors::{Judged, Sample, ScoredCompletion, Tokens};
use rehearsal_lm::generate::{Finish, completion_text};
use rehearsal_lm::random::Region;

use super::collect::Rollouts;
use super::collector::Context;
use super::completion::{Asked, Generated};
use super::stats::log_ratio;
use crate::data::PromptRow;
use crate::driver::run::Run;
use crate::driver::stats::mean;
use crate::error::Result;
use crate::summary::{Answer, Evaluation, Seconds};

impl Rollouts {
    /// Answers the held-out prompts, each time with the same random numbers, so that differences between evaluations are
    /// the policy's own. `None` without held-out prompts.
    pub async fn evaluate(&self, run: &mut Run) -> Result<Option<Evaluation>> {
        let prompts = &self.prompts.held_out;
        if prompts.is_empty() {
            return Ok(None);
        }
        // An answer without a score says nothing of the policy.
        let answers = self.answers(run, prompts).await?;
        let (answers, prompts): (Vec<_>, Vec<_>) =
            answers.into_iter().zip(prompts).filter(|(answer, _)| !answer.judged.skipped).unzip();
        let answer = |(a, prompt): (&ScoredCompletion, &PromptRow)| Answer {
            prompt: prompt.text.clone(),
            completion: a.text.clone(),
            score: a.judged.score,
        };
        let stats = [
            ("reward", mean(answers.iter().map(|a| a.judged.score))),
            ("kl", mean(answers.iter().map(log_ratio))),
            ("tokens", mean(answers.iter().map(|a| a.completion.tokens.len() as f64))),
        ];
        Ok(Some(Evaluation {
            step: run.state.step,
            stats: stats.map(|(name, value)| (name.to_string(), value)).into(),
            samples: answers.iter().zip(prompts).take(run.common.evaluation.samples).map(answer).collect(),
        }))
    }

    /// One completion of each prompt, scored, with log-probabilities under the reference.
    async fn answers(&self, run: &mut Run, prompts: &[PromptRow]) -> Result<Vec<ScoredCompletion>> {
        let generated =
            self.collector.generate_once(&Context::of(run), prompts, Region::EvaluationRollouts.first()).await?;
        let judged = self.score_answers(run, prompts, &generated).await?;
        let all: Vec<&Generated> = generated.iter().collect();
        let ref_logprobs =
            self.collector.reference_logprobs(Asked { prompts, k: 1 }, &all, &mut Seconds::default()).await?;
        let scored = |((g, judged), ref_logprobs): ((Generated, Judged), Vec<f32>)| {
            let Generated { completion, text, .. } = g;
            ScoredCompletion { index: 0, policy_version: 0, completion, text, judged, ref_logprobs }
        };
        Ok(generated.into_iter().zip(judged).zip(ref_logprobs).map(scored).collect())
    }

    /// Scores of the answers. A reward that only compares is shown each answer beside the first evaluation's answer to the
    /// same prompt: the score is then the share of wins against the model as it was.
    async fn score_answers(
        &self,
        run: &mut Run,
        prompts: &[PromptRow],
        generated: &[Generated],
    ) -> Result<Vec<Judged>> {
        let samples: Vec<Sample> = generated.iter().map(|g| g.sample(&prompts[g.index])).collect();
        if !self.reward.is_relative() {
            return Ok(self.reward.score(samples).await?);
        }
        if run.state.first_answers.len() != generated.len() {
            run.state.first_answers = generated.iter().map(|g| g.completion.tokens.clone()).collect();
        }
        let mut both = Vec::with_capacity(2 * samples.len());
        for (first, sample) in run.state.first_answers.iter().zip(samples) {
            let completion = completion_text(&self.collector.model.text, first, &self.settings.stop)?;
            let ids = Tokens { completion: first.clone().into(), ..sample.ids.clone() };
            let ended = first.last().is_some_and(|t| self.collector.model.architecture.eos.contains(t));
            let finish = if ended { Finish::Eos } else { Finish::Length };
            both.push(Sample { completion, tokens: first.len(), ids, finish, ..sample.clone() });
            both.push(sample);
        }
        Ok(self.reward.score(both).await?.into_iter().skip(1).step_by(2).collect())
    }
}
