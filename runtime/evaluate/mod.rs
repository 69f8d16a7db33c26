//! Evaluations: reward models against labelled pairs, judges against people, models against each other, and ratings of many.

mod games;
mod judged;
mod models;
mod pairs;
mod report;

pub use games::{RatingReport, ratings};
pub use judged::{JudgeReport, judge_agreement};
pub use models::{Contest, ModelReport, PromptResult, compare};
pub use pairs::{PairReport, reward_model};
pub use report::html;

use std::path::Path;

use serde_json::Value;

use crate::data::ledger::Shape;
use crate::data::rows;
use crate::error::{Error, Result};

/// Rows of a file as objects, with their places.
fn objects(file: &Path) -> Result<Vec<(String, Value)>> {
    rows::open(file, Shape::Verdicts)?.map(|row| row.map(|row| (row.place, row.columns))).collect()
}

fn wrong(file: &Path, place: &str, message: impl std::fmt::Display) -> Error {
    Error::Prompts { file: file.into(), message: format!("{place}: {message}") }
}

/// The first of several columns that a row has, as text.
fn text<'a>(row: &'a Value, columns: &[&str]) -> std::result::Result<&'a str, String> {
    let found = columns.iter().find_map(|c| row.get(c).and_then(Value::as_str));
    found.ok_or_else(|| format!("has none of the columns {}", columns.join(", ")))
}
