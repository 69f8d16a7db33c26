//! Tokenisation of prompts, completions and conversations by the model's chat template.

use std::sync::Arc;

use rehearsal_actors::{MaskedSequence, Tokens};
use rehearsal_lm::{Message, Text};

use super::columns::TextOrMessages;
use super::dropped::Unusable;

type Result<T> = std::result::Result<T, Unusable>;

/// Tokenises rows for one model.
pub struct RowTokenizer<'a> {
    pub text: &'a Text,
    /// End-of-sequence tokens.
    pub eos: &'a [u32],
    /// Render prompts that are plain texts by the chat template too, if the model has one.
    pub chat: bool,
    /// System message for conversations without one.
    pub system: Option<&'a str>,
    /// Longest row in tokens.
    pub tokens_max: usize,
    /// Cut rows that are too long at the end, instead of refusing them.
    pub truncate: bool,
}

impl RowTokenizer<'_> {
    /// A prompt as messages, with the system message.
    fn messages(&self, prompt: &TextOrMessages) -> Vec<Message> {
        let mut messages = match prompt {
            TextOrMessages::Text(text) => vec![Message::user(text)],
            TextOrMessages::Messages(messages) => messages.clone(),
        };
        if let (Some(system), false) = (self.system, messages.iter().any(|m| m.role == "system")) {
            messages.insert(0, Message::system(system));
        }
        messages
    }

    /// Whether a prompt is rendered by the chat template.
    fn is_templated(&self, prompt: &TextOrMessages) -> bool {
        self.text.template().is_some() && (self.chat || matches!(prompt, TextOrMessages::Messages(_)))
    }

    /// Tokens of a prompt, up to where the completion begins.
    pub fn prompt(&self, prompt: &TextOrMessages) -> Result<Vec<u32>> {
        let encoded = match prompt {
            TextOrMessages::Text(text) if !self.is_templated(prompt) => self.text.encode(text),
            prompt => self.text.encode_chat(&self.messages(prompt)),
        };
        encoded.map_err(|e| Unusable::Bad(e.to_string()))
    }

    /// Tokens of a prompt and one completion, which ends with the token that ends a turn of the model.
    pub fn completion(&self, prompt: &TextOrMessages, completion: &str) -> Result<Tokens> {
        self.completions(prompt, &[completion]).map(|mut all| all.remove(0))
    }

    /// Tokens of a prompt and several completions; the completions share the prompt's tokens.
    pub fn completions(&self, prompt: &TextOrMessages, completions: &[&str]) -> Result<Vec<Tokens>> {
        let tokens = Arc::new(self.prompt(prompt)?);
        completions
            .iter()
            .map(|text| {
                if text.trim().is_empty() {
                    return Err(Unusable::Bad("has an empty completion".into()));
                }
                let mut completion = self.text.encode_plain(text).map_err(|e| Unusable::Bad(e.to_string()))?;
                completion.extend(self.text.end_of_turn(self.eos));
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

    /// Tokens of a conversation, with the turns of the assistant marked.
    pub fn conversation(&self, messages: &[Message]) -> Result<MaskedSequence> {
        let bad = |reason: &str| Unusable::Bad(reason.into());
        let Some(template) = self.text.template() else {
            return Err(bad("is a conversation, and the model has no chat template"));
        };
        let messages = self.messages(&TextOrMessages::Messages(messages.to_vec()));
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
                return Err(bad(
                    "has a turn that the chat template renders differently once others follow, so its tokens cannot \
                     be marked",
                ));
            }
            let before = encode(&whole[at..open.len()])?;
            marks.resize(marks.len() + before.len(), false);
            tokens.extend(before);
            let turn = encode(&whole[open.len()..closed.len()])?;
            // MaskedSequence up to the end-of-sequence token, and not what the template renders after it.
            let marked = turn.iter().position(|t| self.eos.contains(t)).map_or(turn.len(), |end| end + 1);
            marks.extend((0..turn.len()).map(|i| i < marked));
            tokens.extend(turn);
            at = closed.len();
        }
        if !marks.iter().any(|&m| m) {
            return Err(bad("has no turn of the assistant"));
        }
        self.limit(tokens, marks)
    }

    /// Tokens of a plain text with an end-of-sequence token, all marked.
    pub fn plain(&self, text: &str) -> Result<MaskedSequence> {
        let mut tokens = self.text.encode(text).map_err(|e| Unusable::Bad(e.to_string()))?;
        tokens.extend(self.eos.first());
        let marks = vec![true; tokens.len()];
        self.limit(tokens, marks)
    }

    /// Applies `tokens_max`.
    fn limit(&self, mut tokens: Vec<u32>, mut marks: Vec<bool>) -> Result<MaskedSequence> {
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
