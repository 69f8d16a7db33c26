//! What a job knows besides its weights: saved in every checkpoint, restored by every resume.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// First byte of an encoded state.
const VERSION: u8 = 3;

/// The state of a job between two steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobState {
    /// Steps done.
    pub step: u64,
    /// Prompts or rows drawn.
    pub cursor: u64,
    pub counters: Counters,
    pub evaluations: Vec<Evaluation>,
    /// Coefficient of PPO's KL penalty, once it has adapted.
    pub kl_coef: Option<f64>,
    /// The first answers to the held-out prompts, as tokens, where the reward can only compare: later ones meet them.
    pub first_answers: Vec<Vec<u32>>,
}

/// Counts since the job began, as exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    pub steps: u64,
    pub updates: u64,
    pub rollouts: u64,
    pub generated_tokens: u64,
    pub trained_tokens: u64,
    pub pairs: u64,
    pub ties: u64,
    pub truncated: u64,
    pub stale: u64,
}

/// How the model did on what is kept apart: held-out prompts it answered, or held-out rows it read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: u64,
    /// Numbers by name: `reward`, `kl`, `tokens` of answers; `loss`, `accuracy`, `margin` of rows.
    pub stats: BTreeMap<String, f64>,
    pub samples: Vec<Answer>,
}

impl Evaluation {
    /// A number by name.
    pub fn stat(&self, name: &str) -> Option<f64> {
        self.stats.get(name).copied()
    }

    /// Mean score of the answers; 0 where there are none.
    pub fn reward(&self) -> f64 {
        self.stat("reward").unwrap_or_default()
    }

    /// Mean over answers of the summed log-ratio to the reference (k1); 0 where there are none.
    pub fn kl(&self) -> f64 {
        self.stat("kl").unwrap_or_default()
    }
}

/// One answer to look at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub prompt: String,
    pub completion: String,
    pub score: f64,
}

impl JobState {
    /// Bytes for a checkpoint.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let body = postcard::to_stdvec(self).map_err(|e| Error::State(e.to_string()))?;
        Ok([&[VERSION], body.as_slice()].concat())
    }

    /// From a checkpoint.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        match bytes.split_first() {
            Some((&VERSION, body)) => postcard::from_bytes(body).map_err(|e| Error::State(e.to_string())),
            // Version 2 ended before the last field, which is then empty: a list of no items.
            Some((2, body)) => postcard::from_bytes(&[body, &[0]].concat()).map_err(|e| Error::State(e.to_string())),
            Some((version, _)) => Err(Error::State(format!("it has version {version}; this program reads {VERSION}"))),
            None => Err(Error::State("it is empty".into())),
        }
    }
}
