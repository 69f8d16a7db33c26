//! What there is to label, from files: `prompt` with `completions`, or with `chosen` and `rejected`, or alone.

use std::path::Path;

use rehearsal_store::{Prompt, Turn};
use serde_json::Value;

use super::board::Item;
use crate::data::encode::{Said, said};
use crate::data::ledger::Shape;
use crate::data::{preferences, rows};
use crate::error::{Error, Result};

/// The items of a file or of another job's ledger, in order.
pub fn read(file: &Path) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for row in rows::open(file, Shape::Verdicts)? {
        let row = row?;
        let wrong = |reason: String| Error::Prompts { file: file.into(), message: format!("{}: {reason}", row.place) };
        items.push(item(&row.columns).map_err(wrong)?);
    }
    if items.is_empty() {
        return Err(Error::Prompts { file: file.into(), message: "has no rows".into() });
    }
    Ok(items)
}

fn item(columns: &Value) -> std::result::Result<Item, String> {
    let has = |column: &str| columns.get(column).is_some_and(|v| !v.is_null());
    let (prompt, completions) = if has("completions") {
        let texts = columns["completions"].as_array().map(|all| all.iter().map(preferences::answer).collect());
        let texts: Option<Vec<String>> = texts.unwrap_or_default();
        (said(columns, "prompt")?, texts.ok_or("has `completions` that are no list of texts")?)
    } else if has("chosen") {
        let (prompt, chosen, rejected) = preferences::texts(columns)?;
        (prompt, vec![chosen, rejected])
    } else {
        (said(columns, "prompt")?, Vec::new())
    };
    let prompt = match prompt {
        Said::Text(text) => Prompt::Text(text),
        Said::Messages(messages) => {
            Prompt::Conversation(messages.into_iter().map(|m| Turn { role: m.role, content: m.content }).collect())
        }
    };
    Ok(Item { prompt, completions })
}
