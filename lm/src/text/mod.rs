//! Tokenisation, and rendering of conversations to prompts.

mod chat;

pub use chat::{ChatTemplate, Message};

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

impl Text {
    /// Parses `tokenizer.json` and `tokenizer_config.json`; `template` overrides the chat template of the latter.
    pub fn from_json(tokenizer: &[u8], config: Option<&[u8]>, template: Option<String>) -> Result<Self> {
        let error = |what: &str, e: &dyn std::fmt::Display| Error::Tokenizer(format!("{what}: {e}"));
        let mut tokenizer_ = Tokenizer::from_bytes(tokenizer).map_err(|e| error("tokenizer.json", &e))?;
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
        let encoding = self.tokenizer.encode(text, add).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes tokens, without special ones.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(|e| Error::Tokenizer(e.to_string()))
    }

    /// The chat template, if the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Encodes a conversation up to the start of the assistant's answer; without a chat template, its last message.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match &self.template {
            Some(template) => self.encode_plain(&template.render(messages, true)?),
            None => self.encode(messages.last().map_or("", |m| m.content.as_str())),
        }
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
