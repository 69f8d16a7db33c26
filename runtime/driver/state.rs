//! What a job knows besides its weights: saved in every checkpoint, restored by every resume.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::settings::Measure;
use crate::summary::{Counters, Evaluation, StepSummary};

/// First byte of an encoded state.
const VERSION: u8 = 4;

/// The state of a job between two steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobState {
    /// Steps done.
    pub step: u64,
    /// Prompts or rows drawn.
    pub cursor: u64,
    /// Counts since the job began.
    pub counters: Counters,
    /// The newest evaluations, at most 1,000, in the order of steps.
    pub evaluations: Vec<Evaluation>,
    /// Coefficient of PPO's KL penalty, once it has adapted.
    pub kl_coef: Option<f64>,
    /// The first answers to the held-out prompts, as tokens, where the reward can only compare: later ones meet them.
    pub first_answers: Vec<Vec<u32>>,
    /// The best evaluation by `evaluation.best`.
    pub best: Option<Best>,
}

/// The best evaluation so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Step after which it was made.
    pub step: u64,
    /// Its value.
    pub value: f64,
    /// Evaluations since, none of which was better.
    pub since: u64,
}

/// Evaluations that every checkpoint holds. All are in `evaluations.jsonl`.
const EVALUATIONS_KEPT: usize = 1000;

impl JobState {
    /// Notes an evaluation.
    pub fn evaluated(&mut self, evaluation: Evaluation) {
        self.evaluations.push(evaluation);
        let surplus = self.evaluations.len().saturating_sub(EVALUATIONS_KEPT);
        self.evaluations.drain(..surplus);
    }

    /// Compares an evaluation with the best so far by its value; whether it is better.
    pub fn compare(&mut self, measure: Measure, step: u64, value: f64) -> bool {
        match &mut self.best {
            Some(best) if !measure.is_better(value, best.value) => {
                best.since += 1;
                false
            }
            best => {
                *best = Some(Best { step, value, since: 0 });
                true
            }
        }
    }

    /// Counts a step that drew `drawn` prompts or rows and generated `completions` completions.
    pub fn count(&mut self, summary: &StepSummary, drawn: usize, completions: usize) {
        let stat = |name: &str| summary.stat(name).unwrap_or(0.0);
        self.step += 1;
        self.cursor += drawn as u64;
        let c = &mut self.counters;
        c.steps += 1;
        c.updates = summary.version;
        c.rollouts += completions as u64;
        c.generated_tokens += summary.generated_tokens as u64;
        c.trained_tokens += summary.trained_tokens as u64;
        c.pairs += stat("pairs") as u64;
        c.ties += stat("ties") as u64;
        c.truncated += (stat("truncated") * completions as f64).round() as u64;
    }

    /// Bytes for a checkpoint.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let body = postcard::to_stdvec(self).map_err(|e| Error::Internal(e.to_string()))?;
        Ok([&[VERSION], body.as_slice()].concat())
    }

    /// From a checkpoint.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let damaged = |e: postcard::Error| Error::SavedState { reason: e.to_string() };
        match bytes.split_first() {
            Some((&VERSION, body)) => postcard::from_bytes(body).map_err(damaged),
            // Older versions end before the last fields, which are then empty: nothing, and before that a list of no items.
            Some((3, body)) => postcard::from_bytes(&[body, &[0]].concat()).map_err(damaged),
            Some((2, body)) => postcard::from_bytes(&[body, &[0, 0]].concat()).map_err(damaged),
            Some((version, _)) => {
                let reason = format!("it has version {version}; this program reads up to {VERSION}");
                Err(Error::SavedState { reason })
            }
            None => Err(Error::SavedState { reason: "it is empty".into() }),
        }
    }
}
