//! Tokenisation, and rendering of conversations to prompts.

mod chat;

pub use chat::{ChatTemplate, Message, compile, render, sandbox};

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// A tokenizer with its configuration and chat template.
#[derive(Clone)]
pub struct Text {
    tokenizer: Tokenizer,
    tokenizer_json: String,
    config: Value,
    template: Option<ChatTemplate>,
}

/// Most times that a tokenizer's replacements may lengthen a text, one after the other.
const EXPANSION_MAX: f64 = 1024.0;

/// Checks how much longer the replacements of a `tokenizer.json` can make a text: a chain of them can make gigabytes of a
/// line.
fn expansion(tokenizer: &[u8]) -> std::result::Result<(), String> {
    /// The product over all replacements in a part of the file.
    fn factor(part: &Value) -> f64 {
        let own = if part["type"] == "Replace" {
            let content = part["content"].as_str().map_or(0, str::len);
            let pattern = part["pattern"]["String"].as_str().map_or(1, str::len);
            (content as f64 / pattern.max(1) as f64).max(1.0)
        } else {
            1.0
        };
        let inner: f64 = match part {
            Value::Array(parts) => parts.iter().map(factor).product(),
            Value::Object(parts) => parts.values().map(factor).product(),
            _ => 1.0,
        };
        own * inner
    }
    /// The parts that may replace text. The vocabulary, which is most of the file, is passed over.
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Parts {
        normalizer: Value,
        pre_tokenizer: Value,
        decoder: Value,
        post_processor: Value,
    }
    let parts: Parts = serde_json::from_slice(tokenizer).map_err(|e| e.to_string())?;
    for (name, part) in [
        ("normalizer", parts.normalizer),
        ("pre_tokenizer", parts.pre_tokenizer),
        ("decoder", parts.decoder),
        ("post_processor", parts.post_processor),
    ] {
        if factor(&part) > EXPANSION_MAX {
            return Err(format!("the replacements of its {name} lengthen a text more than {EXPANSION_MAX} times"));
        }
    }
    Ok(())
}

/// Calls `tokenizers`, which panics at some kinds of damage in `tokenizer.json`.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("it is damaged, or of a kind that is not known".into()),
    }
}

impl Text {
    /// Parses `tokenizer.json` and `tokenizer_config.json`; `template` overrides the chat template of the latter.
    pub fn from_json(tokenizer: &[u8], config: Option<&[u8]>, template: Option<String>) -> Result<Self> {
        let error = |what: &str, e: &dyn std::fmt::Display| Error::Tokenizer(format!("{what}: {e}"));
        expansion(tokenizer).map_err(|e| error("tokenizer.json", &e))?;
        let mut tokenizer_ = guarded(|| Tokenizer::from_bytes(tokenizer)).map_err(|e| error("tokenizer.json", &e))?;
        // Padding and truncation are up to the caller.
        tokenizer_.with_padding(None);
        tokenizer_.with_truncation(None).map_err(|e| error("tokenizer.json", &e))?;
        let mut config: Value = match config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(|e| error("tokenizer_config.json", &e))?,
            None => Value::Object(Default::default()),
        };
        if let (Some(template), Some(map)) = (template, config.as_object_mut()) {
            map.insert("chat_template".into(), Value::String(template));
        }
        let template = ChatTemplate::from_config(&config)?;
        let tokenizer_json = String::from_utf8(tokenizer.to_vec()).map_err(|e| error("tokenizer.json", &e))?;
        Ok(Self { tokenizer: tokenizer_, tokenizer_json, config, template })
    }

    /// Encodes a text, with the special tokens that the tokenizer adds (such as a leading BOS).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encoded(text, true)
    }

    /// Encodes a text without adding special tokens; those written out in the text become their tokens.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encoded(text, false)
    }

    fn encoded(&self, text: &str, add: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.tokenizer.encode(text, add)).map_err(Error::Tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes tokens, without special ones.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        guarded(|| self.tokenizer.decode(tokens, true)).map_err(Error::Tokenizer)
    }

    /// Decodes tokens, special ones too.
    pub fn decode_all(&self, tokens: &[u32]) -> Result<String> {
        guarded(|| self.tokenizer.decode(tokens, false)).map_err(Error::Tokenizer)
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The same with a date for the chat template, as [`ChatTemplate::with_day`].
    pub fn with_day(mut self, day: u32) -> Self {
        self.template = self.template.map(|template| template.with_day(day));
        self
    }

    /// The text with every special token that is written out in it broken up by a space, so that it is encoded as text.
    pub fn without_special(&self, text: &str) -> String {
        let mut safe = text.to_string();
        for (_, token) in self.tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special) {
            let mut characters = token.content.chars();
            if let Some(first) = characters.next().filter(|_| safe.contains(&token.content)) {
                safe = safe.replace(&token.content, &format!("{first} {}", characters.as_str()));
            }
        }
        safe
    }

    /// Encodes a conversation up to the start of the assistant's answer; without a chat template, its last message.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match &self.template {
            Some(template) => self.encode_plain(&template.render(messages, true)?),
            None => self.encode(messages.last().map_or("", |m| m.content.as_str())),
        }
    }

    /// As [`Text::encode_chat`]; special tokens that are written out in the messages stay text.
    pub fn encode_chat_as_text(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let safe = |m: &Message| Message { content: self.without_special(&m.content), ..m.clone() };
        self.encode_chat(&messages.iter().map(safe).collect::<Vec<_>>())
    }

    /// Token that ends a turn of the assistant: the first of `eos` that the chat template renders after one, or the first of
    /// them.
    pub fn end_of_turn(&self, eos: &[u32]) -> Option<u32> {
        let turn = [Message::user("a"), Message { role: "assistant".into(), content: "b".into() }];
        let from_template = || {
            let template = self.template.as_ref()?;
            let (open, whole) = (template.render(&turn[..1], true).ok()?, template.render(&turn, false).ok()?);
            let rest = self.encode_plain(whole.strip_prefix(&open)?).ok()?;
            rest.into_iter().find(|t| eos.contains(t))
        };
        from_template().or(eos.first().copied())
    }

    /// `tokenizer.json` as it was read.
    pub fn tokenizer_json(&self) -> &str {
        &self.tokenizer_json
    }

    /// `tokenizer_config.json`, template included.
    pub fn config(&self) -> &Value {
        &self.config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_of_replacements_is_refused() {
        let double = serde_json::json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let file = |n: usize| {
            let chain = serde_json::json!({"normalizer": {"type": "Sequence", "normalizers": vec![double.clone(); n]}});
            chain.to_string()
        };
        assert!(expansion(file(10).as_bytes()).is_ok());
        assert!(expansion(file(32).as_bytes()).unwrap_err().contains("normalizer"));
    }
}
