//! A completion on its way from the sampler to the buffer, and its records in the log.

use rehearsal_actors::{Judged, Sample, ScoredCompletion, Tokens};
use rehearsal_lm::generate::{Completion, Finish};
use rehearsal_store::{RolloutRecord, ScoreRecord};

use crate::data::PromptRow;
use crate::summary::Seconds;

/// A generated completion with its place in the step: `index = prompt * completions_per_prompt + completion`.
pub struct Generated {
    pub index: usize,
    pub completion: Completion,
    pub text: String,
}

impl Generated {
    /// The tokens of the completion after its prompt's.
    pub fn tokens(&self, prompt: &PromptRow) -> Tokens {
        Tokens { prompt: prompt.tokens.clone(), completion: self.completion.tokens.clone().into() }
    }

    /// The completion as a reward reads it.
    pub fn sample(&self, prompt: &PromptRow) -> Sample {
        Sample {
            prompt: prompt.text.clone(),
            messages: prompt.messages.clone(),
            completion: self.text.clone(),
            tokens: self.completion.tokens.len(),
            ids: self.tokens(prompt),
            finish: self.completion.finish,
            answer: prompt.answer.clone(),
            row: prompt.row,
        }
    }
}

/// The scored completions of a step, each with the place of its prompt.
pub struct Collected {
    pub completions: Vec<(u32, ScoredCompletion)>,
    pub seconds: Seconds,
}

/// The prompts of a step, each answered `k` times.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub prompts: &'a [PromptRow],
    /// Completions of a prompt.
    pub k: usize,
}

impl Asked<'_> {
    /// Completions in all.
    pub fn total(&self) -> usize {
        self.prompts.len() * self.k
    }

    /// The prompt of a completion.
    pub fn prompt(&self, index: usize) -> &PromptRow {
        &self.prompts[index / self.k]
    }
}

/// Scores of a step's completions as the log keeps them.
pub fn score_records(step: u64, judged: &[(usize, Judged)]) -> Vec<ScoreRecord> {
    let record = |(index, judged): &(usize, Judged)| {
        let Judged { score, reason, exchanges, skipped } = judged.clone();
        ScoreRecord { step, index: *index as u32, score, reason, exchanges, skipped }
    };
    judged.iter().map(record).collect()
}

const FINISHES: [Finish; 3] = [Finish::Eos, Finish::Stop, Finish::Length];

/// A completion as the log keeps it.
pub fn to_record(c: &Completion, step: u64, index: u32, policy_version: u64) -> RolloutRecord {
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

/// A completion from the log.
pub fn from_record(r: &RolloutRecord) -> Completion {
    let finish = FINISHES.get(r.finish as usize).copied().unwrap_or(Finish::Length);
    Completion { id: r.id, tokens: r.tokens.clone(), logprobs: r.logprobs.clone(), finish }
}
