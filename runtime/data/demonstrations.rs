//! Rows of supervised fine-tuning: `prompt` and `completion`, `messages`, or `text`.

use std::sync::Arc;

use rehearsal_actors::MaskedSequence;

use super::columns::{TextOrMessages, text_or_messages};
use super::dropped::Unusable;
use super::rows::Row;
use super::tokenize::RowTokenizer;

/// Tokenises a demonstration and marks the tokens to learn: completions, turns of the assistant, or all of a plain
/// text.
pub fn read(row: &Row, tokenizer: &RowTokenizer<'_>) -> Result<MaskedSequence, Unusable> {
    use TextOrMessages::{Messages, Text};
    let has = |column: &str| row.columns.get(column).is_some();
    if has("messages") {
        return match text_or_messages(&row.columns, "messages")? {
            Messages(messages) => tokenizer.conversation(&messages),
            Text(_) => Err(Unusable::Bad("has a text in `messages`, which must be a list of messages".into())),
        };
    }
    if has("text") && !has("prompt") {
        return match text_or_messages(&row.columns, "text")? {
            Text(text) if text.trim().is_empty() => Err(Unusable::Bad("has an empty `text`".into())),
            Text(text) => tokenizer.plain(&text),
            Messages(messages) => tokenizer.conversation(&messages),
        };
    }
    match (text_or_messages(&row.columns, "prompt")?, text_or_messages(&row.columns, "completion")?) {
        (Messages(mut prompt), Messages(completion)) => {
            prompt.extend(completion);
            tokenizer.conversation(&prompt)
        }
        (prompt, completion) => {
            let completion = match &completion {
                Text(text) => text.as_str(),
                Messages(messages) => messages[0].content.as_str(),
            };
            let tokens = tokenizer.completion(&prompt, completion)?;
            let marked = |n: usize, mark: bool| std::iter::repeat_n(mark, n);
            let marks = marked(tokens.prompt.len(), false).chain(marked(tokens.completion.len(), true)).collect();
            let all = [tokens.prompt.as_slice(), &tokens.completion].concat();
            Ok(MaskedSequence { tokens: Arc::new(all), loss_mask: Arc::new(marks) })
        }
    }
}
