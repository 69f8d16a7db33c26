//! Values of a row's columns in TRL's formats: texts, conversations, completions, pairs.

use rehearsal_lm::Message;
use rehearsal_store::{Prompt, Turn};
use serde_json::Value;

/// A column that holds a text, or a conversation as a list of messages.
#[derive(Debug, Clone, PartialEq)]
pub enum TextOrMessages {
    Text(String),
    /// One message or more.
    Messages(Vec<Message>),
}

impl TextOrMessages {
    /// Converts to a prompt of the ledger.
    pub fn into_prompt(self) -> Prompt {
        match self {
            Self::Text(text) => Prompt::Text(text),
            Self::Messages(messages) => {
                Prompt::Conversation(messages.into_iter().map(|m| Turn { role: m.role, content: m.content }).collect())
            }
        }
    }
}

/// Parses a column as a text or a list of messages. The error completes a sentence that begins with the row.
pub fn text_or_messages(columns: &Value, column: &str) -> Result<TextOrMessages, String> {
    match columns.get(column) {
        None if columns.is_object() => Err(format!("has no column `{column}`")),
        None => Err(columns.as_str().filter(|s| s.starts_with("is no JSON")).unwrap_or("is no JSON object").into()),
        Some(Value::String(text)) => Ok(TextOrMessages::Text(text.clone())),
        Some(Value::Array(messages)) => {
            let message = |m: &Value| serde_json::from_value(m.clone()).ok();
            let messages: Option<Vec<Message>> = messages.iter().map(message).collect();
            match messages {
                Some(messages) if !messages.is_empty() => Ok(TextOrMessages::Messages(messages)),
                Some(_) => Err(format!("has an empty list of messages in `{column}`")),
                None => Err(format!("has a message without `role` and `content` in `{column}`")),
            }
        }
        Some(_) => Err(format!("has a `{column}` that is neither a text nor a list of messages")),
    }
}

/// Text of a completion: a text, or the content of the last of several messages.
pub fn completion(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(messages) => messages.last()?["content"].as_str().map(String::from),
        _ => None,
    }
}

/// Texts of the column `completions`.
pub fn completions(columns: &Value) -> Result<Vec<String>, String> {
    let texts = columns["completions"].as_array().and_then(|all| all.iter().map(completion).collect());
    texts.ok_or_else(|| "has `completions` that are no list of texts".into())
}

/// Prompt, chosen and rejected completion. Without a column `prompt`, `chosen` and `rejected` must be conversations
/// that differ in their last message only; the messages before it are the prompt.
pub fn pair(columns: &Value) -> Result<(TextOrMessages, String, String), String> {
    use TextOrMessages::{Messages, Text};
    let (chosen, rejected) = (text_or_messages(columns, "chosen")?, text_or_messages(columns, "rejected")?);
    let last = |messages: &[Message]| messages.last().map(|m| m.content.clone()).unwrap_or_default();
    if columns.get("prompt").is_some() {
        let text = |value: TextOrMessages| match value {
            Text(text) => text,
            Messages(messages) => last(&messages),
        };
        let (chosen, rejected) = (text(chosen), text(rejected));
        if chosen == rejected {
            return Err("has the same text in `chosen` and `rejected`".into());
        }
        return Ok((text_or_messages(columns, "prompt")?, chosen, rejected));
    }
    let (Messages(chosen), Messages(rejected)) = (chosen, rejected) else {
        return Err("has no column `prompt`".into());
    };
    let n = chosen.len().min(rejected.len());
    let shared = (0..n).take_while(|&i| chosen[i] == rejected[i]).count();
    if shared == 0 || shared + 1 != chosen.len() || shared + 1 != rejected.len() {
        return Err("has no `prompt`, and conversations that differ in more than their last message".into());
    }
    Ok((Messages(chosen[..shared].to_vec()), last(&chosen), last(&rejected)))
}

/// A number that may be absent or null.
pub fn number(columns: &Value, column: &str) -> Result<Option<f64>, String> {
    match columns.get(column).filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or(format!("has a `{column}` that is no number")),
    }
}
