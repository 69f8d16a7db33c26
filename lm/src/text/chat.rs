//! Chat templates in Jinja, rendered as in `transformers`.

use std::sync::Arc;

use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

impl Message {
    /// A user message.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }
}

/// A compiled chat template, with the special tokens that it may use.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the texts of its special tokens.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        // As in transformers: trim_blocks, lstrip_blocks, and Python's methods on strings and lists.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment
            .add_template_owned("chat", source.to_string())
            .map_err(|e| Error::Template(format!("does not compile: {e:#}")))?;
        Ok(Self { environment: Arc::new(environment), bos: bos.into(), eos: eos.into() })
    }

    /// The template of a `tokenizer_config.json`: a string, or the entry named `default` of a list.
    pub(crate) fn from_config(config: &Value) -> Result<Option<Self>> {
        let source = match &config["chat_template"] {
            Value::String(source) => Some(source.as_str()),
            Value::Array(named) => named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()),
            _ => None,
        };
        // A special token is a string, or an object with a `content`.
        let token =
            |key: &str| config[key].as_str().or(config[key]["content"].as_str()).unwrap_or_default().to_string();
        source.map(|source| Self::new(source, &token("bos_token"), &token("eos_token"))).transpose()
    }

    /// Renders a conversation to text; `add_generation_prompt` opens the assistant's turn at the end.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let error = |e: minijinja::Error| match e.detail() {
            Some(detail) => Error::Template(detail.to_string()),
            None => Error::Template(format!("{e:#}")),
        };
        let values = context! { messages, add_generation_prompt, bos_token => self.bos, eos_token => self.eos };
        self.environment.get_template("chat").and_then(|t| t.render(values)).map_err(error)
    }
}
