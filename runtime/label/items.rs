//! Reads items to label from rows with `prompt` and `completions`, with `prompt`, `chosen` and `rejected`, or with
//! `prompt` alone.

use std::path::Path;

use serde_json::Value;

use super::queue::Item;
use crate::data::columns::{self, text_or_messages};
use crate::data::ledger::Shape;
use crate::data::rows;
use crate::error::{Error, Result};

/// Reads the items of a file or of another job's ledger, in order. An unusable row is an error that names it.
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
        (text_or_messages(columns, "prompt")?, columns::completions(columns)?)
    } else if has("chosen") {
        let (prompt, chosen, rejected) = columns::pair(columns)?;
        (prompt, vec![chosen, rejected])
    } else {
        (text_or_messages(columns, "prompt")?, Vec::new())
    };
    Ok(Item { prompt: prompt.into_prompt(), completions })
}
