//! Rows of evaluation files.

use std::path::Path;

use serde_json::Value;

use crate::data::ledger::Shape;
use crate::data::rows;
use crate::error::{Error, Result};

/// Reads all rows of a file as objects, each with its place, as `line 7`.
pub fn objects(file: &Path) -> Result<Vec<(String, Value)>> {
    rows::open(file, Shape::Verdicts)?.map(|row| row.map(|row| (row.place, row.columns))).collect()
}

/// An error in a row.
pub fn row_error(file: &Path, place: &str, message: impl std::fmt::Display) -> Error {
    Error::Prompts { file: file.into(), message: format!("{place}: {message}") }
}

/// Text of the first of `columns` that the row has.
pub fn text<'a>(row: &'a Value, columns: &[&str]) -> std::result::Result<&'a str, String> {
    let found = columns.iter().find_map(|c| row.get(c).and_then(Value::as_str));
    found.ok_or_else(|| format!("has none of the columns {}", columns.join(", ")))
}

/// A label: text or number in the first of `columns` that the row has.
pub fn label(row: &Value, columns: &[&str]) -> std::result::Result<String, String> {
    let found = columns.iter().find_map(|c| match row.get(c)? {
        Value::String(text) => Some(text.trim().to_string()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    });
    found.ok_or_else(|| format!("has none of the columns {}", columns.join(", ")))
}
