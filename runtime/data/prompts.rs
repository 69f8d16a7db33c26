//! Prompts: rows with TRL's column `prompt`, which is a text or a conversation.

use std::path::Path;
use std::sync::Arc;

use rehearsal_lm::{Message, Text};
use rehearsal_store::{Prompt, Turn};
use serde_json::Value;

use super::ledger::Shape;
use super::rows::{self, Row};
use super::settings::{OnBad, PromptsSettings};
use super::shuffle::order;
use crate::error::{Error, Result};
use crate::settings::EvaluationSettings;

/// A tokenised prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRow {
    /// Row in its file, from 0.
    pub row: u64,
    /// The prompt as it is in the file.
    pub prompt: Prompt,
    /// Text for scorers: the only message, or `role: content` of each turn.
    pub text: String,
    /// Messages that the chat template rendered; empty for a plain text.
    pub messages: Arc<Vec<Message>>,
    /// Token ids that the policy continues.
    pub tokens: Arc<Vec<u32>>,
    /// Reference answer, if the row has one.
    pub answer: Option<String>,
}

/// Prompts of a job, and the numbers of those left out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompts {
    /// Prompts to train on.
    pub train: Vec<PromptRow>,
    /// Prompts for evaluation.
    pub held_out: Vec<PromptRow>,
    /// Malformed rows left out.
    pub bad_lines: u64,
    /// Rows left out because they have too many tokens.
    pub too_long: u64,
}

impl Prompts {
    /// Mean length of the training prompts in tokens, rounded up.
    pub fn mean_tokens(&self) -> u64 {
        let total: u64 = self.train.iter().map(|p| p.tokens.len() as u64).sum();
        total.div_ceil(self.train.len().max(1) as u64)
    }

    /// Reads, checks and tokenizes a job's prompts. A prompt may have `context` tokens at most.
    pub fn load(
        settings: &PromptsSettings,
        evaluation: &EvaluationSettings,
        text: &Text,
        context: usize,
    ) -> Result<Self> {
        let mut prompts = Self::default();
        let tokens_max = match settings.tokens_max {
            0 => context,
            n => n.min(context),
        };
        prompts.train = prompts.read(settings, text, settings.train.as_deref(), tokens_max)?;
        let n = evaluation.prompts;
        if let Some(file) = &settings.held_out {
            prompts.held_out = prompts.read(settings, text, Some(file), tokens_max)?;
            prompts.held_out.truncate(n);
        } else if evaluation.every_steps > 0 {
            let kept = n.min(prompts.train.len() / 5);
            prompts.held_out = prompts.train.split_off(prompts.train.len() - kept);
        }
        Ok(prompts)
    }

    fn read(
        &mut self,
        settings: &PromptsSettings,
        text: &Text,
        file: Option<&Path>,
        tokens_max: usize,
    ) -> Result<Vec<PromptRow>> {
        let name = file.unwrap_or(Path::new("the embedded prompts"));
        let error =
            |place: &str, message: String| Error::Prompts { file: name.into(), message: format!("{place}: {message}") };
        let source: Box<dyn Iterator<Item = Result<Row>>> = match file {
            Some(file) => rows::open(file, Shape::Verdicts)?,
            None => Box::new(
                crate::embedded::prompts()
                    .lines()
                    .enumerate()
                    .map(|(i, line)| {
                        let columns = serde_json::from_str(line).unwrap_or_default();
                        Ok(Row { columns, place: format!("line {}", i + 1), index: i as u64 })
                    })
                    .collect::<Vec<_>>()
                    .into_iter(),
            ),
        };
        let mut rows = Vec::new();
        for source in source {
            let source = source?;
            let row = match parse(&source.columns, settings) {
                Ok(row) => row,
                Err(_) if settings.on_bad_line == OnBad::Skip => {
                    self.bad_lines += 1;
                    continue;
                }
                Err(message) => {
                    return Err(error(
                        &source.place,
                        format!("{message}; correct it, or set `prompts.on_bad_line = \"skip\"`"),
                    ));
                }
            };
            let messages = messages(&row.prompt, settings);
            let tokens = encode(&row.prompt, &messages, settings, text)?;
            if tokens.len() > tokens_max {
                if settings.on_long == OnBad::Fail {
                    let n = tokens.len();
                    return Err(error(
                        &source.place,
                        format!(
                            "the prompt has {n} tokens and may have {tokens_max}; \
                             shorten it, or set `prompts.on_long = \"skip\"`"
                        ),
                    ));
                }
                self.too_long += 1;
                continue;
            }
            rows.push(PromptRow {
                row: source.index,
                text: transcript(&row.prompt),
                prompt: row.prompt,
                messages: Arc::new(messages),
                tokens: Arc::new(tokens),
                answer: row.answer,
            });
        }
        if rows.is_empty() {
            let message = format!("no prompt can be used ({} bad lines, {} too long)", self.bad_lines, self.too_long);
            return Err(Error::Prompts { file: name.into(), message });
        }
        Ok(rows)
    }

    /// Counts and a hash of tokens and reference answers; independent of file names.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for row in self.train.iter().chain(&self.held_out) {
            for token in row.tokens.iter() {
                hasher.update(&token.to_le_bytes());
            }
            hasher.update(row.answer.as_deref().unwrap_or_default().as_bytes()).update(b"\0");
        }
        format!("{} + {} held out, {}", self.train.len(), self.held_out.len(), &hasher.finalize().to_hex()[..16])
    }

    /// Training prompts of draws `cursor .. cursor + n`; each epoch is a permutation of all.
    pub fn draw(&self, seed: u64, cursor: u64, n: usize) -> Vec<&PromptRow> {
        order(seed, cursor, n, self.train.len()).into_iter().map(|i| &self.train[i]).collect()
    }
}

/// Token ids that the policy continues, of a prompt as it is in the file.
pub fn encode_prompt(prompt: &Prompt, settings: &PromptsSettings, text: &Text) -> Result<Vec<u32>> {
    encode(prompt, &messages(prompt, settings), settings, text)
}

fn encode(prompt: &Prompt, messages: &[Message], settings: &PromptsSettings, text: &Text) -> Result<Vec<u32>> {
    Ok(match (messages, settings.special_tokens) {
        ([], true) => text.encode(prompt.last())?,
        ([], false) => text.encode(&text.without_special(prompt.last()))?,
        (messages, true) => text.encode_chat(messages)?,
        (messages, false) => text.encode_chat_as_text(messages)?,
    })
}

struct Parsed {
    prompt: Prompt,
    answer: Option<String>,
}

fn parse(value: &Value, settings: &PromptsSettings) -> std::result::Result<Parsed, String> {
    if let Some(reason) = value.as_str().filter(|s| s.starts_with("is no JSON")) {
        return Err(reason.into());
    }
    let prompt = value.get("prompt").ok_or("has no column `prompt`")?;
    let prompt = match prompt {
        Value::String(text) => Prompt::Text(text.clone()),
        Value::Array(messages) => {
            let turns: Vec<Turn> = messages
                .iter()
                .map(|m| {
                    serde_json::from_value(m.clone())
                        .map_err(|_| "has a message without `role` and `content`".to_string())
                })
                .collect::<std::result::Result<_, _>>()?;
            Prompt::Conversation(turns)
        }
        _ => return Err("has a `prompt` that is neither a text nor a list of messages".into()),
    };
    if prompt.last().trim().is_empty() {
        return Err("has an empty prompt".into());
    }
    let answer = value.get(&settings.answer_column).map(|a| a.as_str().map_or_else(|| a.to_string(), String::from));
    Ok(Parsed { prompt, answer })
}

/// Text of a prompt for scorers: the only message, or `role: content` of each turn, without the system message.
fn transcript(prompt: &Prompt) -> String {
    let turns: Vec<&Turn> = match prompt {
        Prompt::Text(text) => return text.clone(),
        Prompt::Conversation(turns) => turns.iter().filter(|t| t.role != "system").collect(),
    };
    match turns.as_slice() {
        [only] => only.content.clone(),
        turns => turns.iter().map(|t| format!("{}: {}", t.role, t.content)).collect::<Vec<_>>().join("\n\n"),
    }
}

/// Messages for the chat template; none if prompts are not rendered by it.
fn messages(prompt: &Prompt, settings: &PromptsSettings) -> Vec<Message> {
    if !settings.chat {
        return Vec::new();
    }
    let mut messages: Vec<Message> = match prompt {
        Prompt::Text(text) => vec![Message::user(text)],
        Prompt::Conversation(turns) => {
            turns.iter().map(|t| Message { role: t.role.clone(), content: t.content.clone() }).collect()
        }
    };
    if let (Some(system), false) = (&settings.system, messages.iter().any(|m| m.role == "system")) {
        messages.insert(0, Message::system(system));
    }
    messages
}
