//! What can be asked about a job, whether or not it runs: the same requests and replies in this process, over the job's
//! socket, and from its store.

use std::path::PathBuf;

use candle_core::DType;
use rehearsal_lm::generate::{Finish, Options, Sampling};
use rehearsal_lm::{Message, Text};
use rehearsal_store::{CheckpointSummary, Preference, Query, RolloutRecord, ScoreRecord};
use serde::{Deserialize, Serialize};

use super::overrule::Overrule;
use super::tokens::{Score, ScoredTokens};
use crate::error::{Error, Result};
use crate::status::JobStatus;

/// Most records that one reply holds; readers ask for the next page.
pub const PAGE: usize = 256;
/// The same for records in brief.
pub const BRIEF_PAGE: usize = 4096;
/// Longest completion that may be asked for, in tokens; the model's context is a limit too.
const NEW_TOKENS_MAX: usize = 1 << 20;

/// A request about a job.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    Status,
    Generate(Generate),
    Export {
        directory: PathBuf,
        dtype: WeightType,
    },
    Checkpoints,
    /// The first records that match, at most [`PAGE`].
    Preferences(Query),
    Rollouts {
        step: u64,
    },
    Verify,
    /// The first records that match in brief, at most [`BRIEF_PAGE`].
    Brief(Query),
    Score(Score),
    Overrule(Overrule),
    Control(Control),
}

/// The reply to a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Status(Box<JobStatus>),
    Generated(Generated),
    Exported {
        step: u64,
    },
    Checkpoints(Vec<CheckpointSummary>),
    Preferences(Vec<Preference>),
    Rollouts(Rollouts),
    Verified(Verified),
    Brief(Vec<Brief>),
    Scored(ScoredTokens),
    Overruled,
    /// The step after which a checkpoint was saved, if one was asked for.
    Controlled {
        step: Option<u64>,
    },
}

/// What a running job is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Wait before the next step.
    Pause,
    /// Go on after a pause.
    Unpause,
    /// Save a checkpoint after the step under way.
    Checkpoint,
    /// End with a checkpoint.
    Stop,
}

/// A record of the ledger without its texts, for lists of many.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Brief {
    /// Step of the job.
    pub step: u64,
    /// Index in the step.
    pub index: u32,
    /// The index of the record that this one, a person's, overrules.
    pub overrules: Option<u32>,
    /// The beginning of the prompt's text, or of its last message.
    pub prompt: String,
    /// Name of the judge.
    pub judge: String,
    /// Number of completions.
    pub completions: u32,
    /// Lowest and highest score; 0 for a demonstration.
    pub scores: (f64, f64),
    /// Length of the shortest and the longest completion, in characters.
    pub characters: (u32, u32),
    /// Whether it is a comparison without a winner.
    pub tie: bool,
    /// Disagreement of the judges, 0 to 1.
    pub disagreement: f64,
    /// Unix time in milliseconds.
    pub time_ms: u64,
}

/// Characters of a prompt in a [`Brief`].
const PROMPT_SHOWN: usize = 120;

impl From<&Preference> for Brief {
    fn from(p: &Preference) -> Self {
        let scores = || p.scores.iter().copied();
        let lengths = || p.completions.iter().map(|c| c.chars().count() as u32);
        Self {
            step: p.step,
            index: p.index,
            overrules: p.overrules(),
            prompt: p.prompt.last().chars().take(PROMPT_SHOWN).collect(),
            judge: p.judge.clone(),
            completions: p.completions.len() as u32,
            scores: (scores().reduce(f64::min).unwrap_or(0.0), scores().reduce(f64::max).unwrap_or(0.0)),
            characters: (lengths().min().unwrap_or(0), lengths().max().unwrap_or(0)),
            tie: p.pair.is_none() && p.completions.len() > 1,
            disagreement: p.disagreement(),
            time_ms: p.time_ms,
        }
    }
}

/// A prompt for the trained model, and how its completion is sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    /// The conversation so far; its last message is the user's.
    pub messages: Vec<Message>,
    /// Longest completion in tokens, at least 1.
    pub max_new_tokens: usize,
    /// At least 0; 0 is greedy decoding.
    pub temperature: f64,
    /// Samples from the most likely tokens whose probabilities add up to this, in (0, 1].
    pub top_p: f64,
    /// The same weights, prompt and seed give the same completion.
    pub seed: u64,
    /// Whether special tokens that are written out in the messages, such as `<|im_end|>`, become those tokens. By default they
    /// stay text: who asks may not be trusted.
    #[serde(default)]
    pub special_tokens: bool,
}

impl Generate {
    /// A message of the user, answered in at most 64 tokens at temperature 0.7.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            messages: vec![Message::user(prompt)],
            max_new_tokens: 64,
            temperature: 0.7,
            top_p: 1.0,
            seed: 0,
            special_tokens: false,
        }
    }

    /// Tokens of the messages.
    pub(crate) fn encode(&self, text: &Text) -> Result<Vec<u32>> {
        let encoded = match self.special_tokens {
            true => text.encode_chat(&self.messages),
            false => text.encode_chat_as_text(&self.messages),
        };
        Ok(encoded?)
    }

    /// The options of the sampler.
    pub(crate) fn options(&self, eos: &[u32]) -> Result<Options> {
        let Self { messages, max_new_tokens, temperature, top_p, seed, special_tokens: _ } = self;
        let wrong = |what: String| Err(Error::Usage(format!("the request to generate {what}")));
        if messages.is_empty() {
            return wrong("has no message; it needs at least one".into());
        }
        if !(1..=NEW_TOKENS_MAX).contains(max_new_tokens) {
            return wrong(format!("asks for {max_new_tokens} tokens; ask for 1 to {NEW_TOKENS_MAX}"));
        }
        if !temperature.is_finite() || *temperature < 0.0 {
            return wrong(format!("has temperature {temperature}; it must be a number of at least 0"));
        }
        if !(*top_p > 0.0 && *top_p <= 1.0) {
            return wrong(format!("has top_p {top_p}; it must be above 0 and at most 1"));
        }
        Ok(Options {
            sampling: Sampling { temperature: *temperature, top_p: *top_p, ..Sampling::default() },
            max_new_tokens: *max_new_tokens,
            min_new_tokens: 0,
            eos: eos.to_vec(),
            stop: Vec::new(),
            seed: *seed,
            batch: 1,
        })
    }
}

/// A completion of the trained model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Generated {
    /// Without special tokens.
    pub text: String,
    /// Length in tokens, with the end-of-sequence token.
    pub tokens: usize,
    /// Whether it ended at the length limit.
    pub truncated: bool,
    /// Updates that the weights had when they sampled it.
    pub version: u64,
}

impl Generated {
    pub(crate) fn new(text: String, tokens: usize, finish: Finish, version: u64) -> Self {
        Self { text, tokens, truncated: finish == Finish::Length, version }
    }
}

/// The logged completions of a step that is under way, in the order of their indices. A checkpoint deletes those of the
/// steps before it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rollouts {
    /// The completions, as tokens.
    pub completions: Vec<RolloutRecord>,
    /// Scores of some or all of them.
    pub scores: Vec<ScoreRecord>,
}

/// What a check of all checksums found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Number of intact records and checkpoints.
    pub intact: u64,
    /// A message for each that is damaged.
    pub damaged: Vec<String>,
}

/// Type of exported weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightType {
    /// 32-bit floating point.
    #[default]
    F32,
    /// IEEE 16-bit floating point.
    F16,
    /// bfloat16.
    Bf16,
}

impl std::str::FromStr for WeightType {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!("there is no type `{name}` of weights; there are f32, f16, bf16")),
        }
    }
}

impl From<WeightType> for DType {
    fn from(t: WeightType) -> Self {
        match t {
            WeightType::F32 => Self::F32,
            WeightType::F16 => Self::F16,
            WeightType::Bf16 => Self::BF16,
        }
    }
}
