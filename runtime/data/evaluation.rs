//! Rows of files for `rehearsal evaluate`.

use rehearsal_lm::{Architecture, Text};

use super::columns::{TextOrMessages, text_or_messages};
use super::ledger::Shape;
use super::preferences::{self, PairRow};
use super::rows;
use super::tokenize::RowTokenizer;
use crate::error::{Error, Result};

/// Reads labelled pairs for an evaluation. Unusable rows are counted; having no usable row is an error.
pub fn labelled_pairs(file: &std::path::Path, text: &Text, architecture: &Architecture) -> Result<LabelledPairs> {
    let (eos, tokens_max) = (architecture.eos.as_slice(), architecture.context);
    let tokenizer = RowTokenizer { text, eos, chat: true, system: None, tokens_max, truncate: true };
    let (mut pairs, mut dropped) = (Vec::new(), 0);
    for row in rows::open(file, Shape::Pairs)? {
        let row = row?;
        match preferences::pair(&row, &tokenizer) {
            Ok(pair) => pairs.push((row.columns["subset"].as_str().map(String::from), pair)),
            Err(_) => dropped += 1,
        }
    }
    if pairs.is_empty() {
        let message = format!("no row can be used ({dropped} bad); rows need `prompt`, `chosen` and `rejected`");
        return Err(Error::Prompts { file: file.into(), message });
    }
    Ok(LabelledPairs { pairs, dropped })
}

/// Labelled pairs, each with the value of its column `subset`.
pub struct LabelledPairs {
    pub pairs: Vec<(Option<String>, PairRow)>,
    /// Number of unusable rows.
    pub dropped: u64,
}

/// Reads the prompts of a file as conversations; a plain text is one message of the user.
pub fn prompts_of(file: &std::path::Path) -> Result<Vec<Vec<rehearsal_lm::Message>>> {
    rows::open(file, Shape::Verdicts)?
        .map(|row| {
            let row = row?;
            match text_or_messages(&row.columns, "prompt") {
                Ok(TextOrMessages::Text(text)) => Ok(vec![rehearsal_lm::Message::user(text)]),
                Ok(TextOrMessages::Messages(messages)) => Ok(messages),
                Err(e) => Err(Error::Prompts { file: file.into(), message: format!("{}: {e}", row.place) }),
            }
        })
        .collect()
}
