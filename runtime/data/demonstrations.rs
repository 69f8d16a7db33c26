//! Rows of supervised fine-tuning: `prompt` and `completion`, `messages`, or `text`.

use std::sync::Arc;

use rehearsal_actors::MaskedSequence;

use super::Unusable;
use super::encode::{Encoder, Said, said};
use super::rows::Row;

/// A demonstration.
pub fn read(row: &Row, encoder: &Encoder<'_>) -> Result<MaskedSequence, Unusable> {
    let has = |column: &str| row.columns.get(column).is_some();
    if has("messages") {
        return match said(&row.columns, "messages")? {
            Said::Messages(messages) => encoder.conversation(&messages),
            Said::Text(_) => Err(Unusable::Bad("has a text in `messages`, which is a list of messages".into())),
        };
    }
    if has("text") && !has("prompt") {
        return match said(&row.columns, "text")? {
            Said::Text(text) if text.trim().is_empty() => Err(Unusable::Bad("has an empty `text`".into())),
            Said::Text(text) => encoder.plain(&text),
            Said::Messages(messages) => encoder.conversation(&messages),
        };
    }
    match (said(&row.columns, "prompt")?, said(&row.columns, "completion")?) {
        (Said::Messages(mut prompt), Said::Messages(answer)) => {
            prompt.extend(answer);
            encoder.conversation(&prompt)
        }
        (prompt, answer) => {
            let answer = match &answer {
                Said::Text(text) => text.as_str(),
                Said::Messages(messages) => messages[0].content.as_str(),
            };
            let tokens = encoder.exchange(&prompt, answer)?;
            let learned = |n: usize, mark: bool| std::iter::repeat_n(mark, n);
            let marks = learned(tokens.prompt.len(), false).chain(learned(tokens.completion.len(), true)).collect();
            let all = [tokens.prompt.as_slice(), &tokens.completion].concat();
            Ok(MaskedSequence { tokens: Arc::new(all), loss_mask: Arc::new(marks) })
        }
    }
}
