//! From columns to tokens: prompts, completions and whole conversations as the model's chat template has them.

use std::sync::Arc;

use rehearsal_actors::{MaskedSequence, Tokens};
use rehearsal_lm::{Message, Text};
use serde_json::Value;

use super::Unusable;

type Parsed<T> = std::result::Result<T, Unusable>;

/// A prompt: a text, or the messages of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    Text(String),
    Messages(Vec<Message>),
}

/// How columns become tokens.
pub struct Encoder<'a> {
    pub text: &'a Text,
    pub eos: &'a [u32],
    /// Texts are put into the chat template, if there is one.
    pub chat: bool,
    /// Put before conversations that have no system message.
    pub system: Option<&'a str>,
    pub tokens_max: usize,
    /// Completions that are too long lose their ends.
    pub truncate: bool,
}

/// A column as a text or a list of messages.
pub fn said(columns: &Value, column: &str) -> std::result::Result<Said, String> {
    match columns.get(column) {
        None if columns.is_object() => Err(format!("has no column `{column}`")),
        None => Err(columns.as_str().filter(|s| s.starts_with("is no JSON")).unwrap_or("is no JSON object").into()),
        Some(Value::String(text)) => Ok(Said::Text(text.clone())),
        Some(Value::Array(messages)) => {
            let message = |m: &Value| serde_json::from_value(m.clone()).ok();
            let messages: Option<Vec<Message>> = messages.iter().map(message).collect();
            match messages {
                Some(messages) if !messages.is_empty() => Ok(Said::Messages(messages)),
                Some(_) => Err(format!("has an empty list of messages in `{column}`")),
                None => Err(format!("has a message without `role` and `content` in `{column}`")),
            }
        }
        Some(_) => Err(format!("has a `{column}` that is neither a text nor a list of messages")),
    }
}

impl Encoder<'_> {
    fn messages(&self, said: &Said) -> Vec<Message> {
        let mut messages = match said {
            Said::Text(text) => vec![Message::user(text)],
            Said::Messages(messages) => messages.clone(),
        };
        if let (Some(system), false) = (self.system, messages.iter().any(|m| m.role == "system")) {
            messages.insert(0, Message::system(system));
        }
        messages
    }

    fn templated(&self, said: &Said) -> bool {
        self.text.template().is_some() && (self.chat || matches!(said, Said::Messages(_)))
    }

    /// Tokens of a prompt, up to where the answer begins.
    pub fn prompt(&self, said: &Said) -> Parsed<Vec<u32>> {
        let encoded = match said {
            Said::Text(text) if !self.templated(said) => self.text.encode(text),
            said => self.text.encode_chat(&self.messages(said)),
        };
        encoded.map_err(|e| Unusable::Bad(e.to_string()))
    }

    /// A prompt with its answer, which ends as the model ends its own.
    pub fn exchange(&self, prompt: &Said, answer: &str) -> Parsed<Tokens> {
        self.exchanges(prompt, &[answer]).map(|mut all| all.remove(0))
    }

    /// A prompt with several answers, which share its tokens.
    pub fn exchanges(&self, prompt: &Said, answers: &[&str]) -> Parsed<Vec<Tokens>> {
        let tokens = Arc::new(self.prompt(prompt)?);
        answers
            .iter()
            .map(|answer| {
                if answer.trim().is_empty() {
                    return Err(Unusable::Bad("has an empty completion".into()));
                }
                let mut completion = self.text.encode_plain(answer).map_err(|e| Unusable::Bad(e.to_string()))?;
                completion.extend(self.end());
                let (n, room) = (tokens.len() + completion.len(), self.tokens_max.saturating_sub(tokens.len()));
                if n > self.tokens_max {
                    if !self.truncate || room == 0 {
                        return Err(Unusable::Long { tokens: n });
                    }
                    completion.truncate(room);
                }
                Ok(Tokens { prompt: tokens.clone(), completion: Arc::new(completion) })
            })
            .collect()
    }

    /// The token that ends the assistant's turn: the first end-of-sequence token that the template puts behind it.
    fn end(&self) -> Option<u32> {
        let turn = [Message::user("a"), Message { role: "assistant".into(), content: "b".into() }];
        let from_template = || {
            let template = self.text.template()?;
            let (open, whole) = (template.render(&turn[..1], true).ok()?, template.render(&turn, false).ok()?);
            let rest = self.text.encode_plain(whole.strip_prefix(&open)?).ok()?;
            rest.into_iter().find(|t| self.eos.contains(t))
        };
        from_template().or(self.eos.first().copied())
    }

    /// A conversation of which the assistant's turns are learned from.
    pub fn conversation(&self, messages: &[Message]) -> Parsed<MaskedSequence> {
        let bad = |reason: &str| Unusable::Bad(reason.into());
        let Some(template) = self.text.template() else {
            return Err(bad("is a conversation, and the model has no chat template"));
        };
        let messages = self.messages(&Said::Messages(messages.to_vec()));
        let render =
            |n: usize, open: bool| template.render(&messages[..n], open).map_err(|e| Unusable::Bad(e.to_string()));
        let encode = |text: &str| self.text.encode_plain(text).map_err(|e| Unusable::Bad(e.to_string()));
        let whole = render(messages.len(), false)?;
        let (mut tokens, mut marks, mut at) = (Vec::new(), Vec::new(), 0);
        for turn in (0..messages.len()).filter(|&i| messages[i].role == "assistant") {
            if messages[turn].content.trim().is_empty() {
                return Err(bad("has an empty turn of the assistant"));
            }
            let (open, closed) = (render(turn, true)?, render(turn + 1, false)?);
            if !(whole.starts_with(&open)
                && whole.starts_with(&closed)
                && at <= open.len()
                && open.len() < closed.len())
            {
                return Err(bad("has a turn that the chat template shows differently later, so it cannot be marked"));
            }
            let before = encode(&whole[at..open.len()])?;
            marks.resize(marks.len() + before.len(), false);
            tokens.extend(before);
            let said = encode(&whole[open.len()..closed.len()])?;
            // The end-of-sequence token is learned; what the template puts behind it is not.
            let learned = said.iter().position(|t| self.eos.contains(t)).map_or(said.len(), |end| end + 1);
            marks.extend((0..said.len()).map(|i| i < learned));
            tokens.extend(said);
            at = closed.len();
        }
        if !marks.iter().any(|&m| m) {
            return Err(bad("has no turn of the assistant"));
        }
        self.limited(tokens, marks)
    }

    /// Text all of which is learned.
    pub fn plain(&self, text: &str) -> Parsed<MaskedSequence> {
        let mut tokens = self.text.encode(text).map_err(|e| Unusable::Bad(e.to_string()))?;
        tokens.extend(self.eos.first());
        let marks = vec![true; tokens.len()];
        self.limited(tokens, marks)
    }

    fn limited(&self, mut tokens: Vec<u32>, mut marks: Vec<bool>) -> Parsed<MaskedSequence> {
        let n = tokens.len();
        if n > self.tokens_max {
            tokens.truncate(self.tokens_max);
            marks.truncate(self.tokens_max);
            if !self.truncate || !marks.iter().any(|&m| m) {
                return Err(Unusable::Long { tokens: n });
            }
        }
        Ok(MaskedSequence { tokens: Arc::new(tokens), loss_mask: Arc::new(marks) })
    }
}
