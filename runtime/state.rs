//! What a job knows besides its weights: saved in every checkpoint, restored by every resume.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// First byte of an encoded state.
const VERSION: u8 = 1;

/// The state of a job between two steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobState {
    /// Steps done.
    pub step: u64,
    /// Prompts drawn.
    pub cursor: u64,
    pub counters: Counters,
    pub evaluations: Vec<Evaluation>,
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

/// How the policy answered the held-out prompts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: u64,
    /// Mean score.
    pub reward: f64,
    /// Mean over answers of the summed log-ratio to the reference (k1).
    pub kl: f64,
    /// Mean length in tokens.
    pub tokens: f64,
    pub samples: Vec<Answer>,
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
            Some((version, _)) => Err(Error::State(format!("it has version {version}; this program reads {VERSION}"))),
            None => Err(Error::State("it is empty".into())),
        }
    }
}
