//! How likely a completion is, token by token.

use rehearsal_actors::Tokens;
use rehearsal_lm::{Text, generate::completion_text};
use rehearsal_store::Prompt;
use serde::{Deserialize, Serialize};

use crate::data::{PromptsSettings, encode_prompt};
use crate::error::{Error, Result};

/// Longest completion in characters that is taken apart.
const CHARACTERS_MAX: usize = 1 << 16;

/// A prompt and a completion whose log-probabilities are asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The prompt, as it is in the data.
    pub prompt: Prompt,
    /// Text of the completion.
    pub completion: String,
}

/// A token of a completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoredToken {
    /// Its text; a part of a character is the replacement character.
    pub text: String,
    /// Log-probability under the trained model, in nats, at temperature 1.
    pub policy: f32,
    /// Log-probability under the reference; `None` for a job without one.
    pub reference: Option<f32>,
}

/// A completion's tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoredTokens {
    /// The tokens, without an end-of-sequence token. The text is tokenized again, which may cut it at other places than where
    /// it was sampled.
    pub tokens: Vec<ScoredToken>,
    /// Updates that the weights had.
    pub version: u64,
}

impl Score {
    /// Tokens of prompt and completion.
    pub(crate) fn encode(&self, text: &Text, settings: &PromptsSettings) -> Result<Tokens> {
        let characters = self.completion.chars().count();
        if self.completion.is_empty() || characters > CHARACTERS_MAX {
            let message = format!("the completion has {characters} characters; it may have 1 to {CHARACTERS_MAX}");
            return Err(Error::Usage(message));
        }
        let prompt = encode_prompt(&self.prompt, settings, text)?;
        let completion = text.encode_plain(&self.completion)?;
        Ok(Tokens { prompt: prompt.into(), completion: completion.into() })
    }
}

impl ScoredTokens {
    /// Joins the tokens of a completion with their log-probabilities.
    pub(crate) fn new(
        text: &Text,
        completion: &[u32],
        policy: &[f32],
        reference: Option<&[f32]>,
        version: u64,
    ) -> Result<Self> {
        let token = |(at, id): (usize, &u32)| {
            Ok(ScoredToken {
                text: completion_text(text, &[*id], &[])?,
                policy: policy[at],
                reference: reference.map(|all| all[at]),
            })
        };
        Ok(Self { tokens: completion.iter().enumerate().map(token).collect::<Result<_>>()?, version })
    }
}
