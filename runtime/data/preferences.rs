//! Rows of preferences: `prompt`, `chosen`, `rejected`, or `prompt`, `completions`, `ranks`.

use rehearsal_actors::{Ranking, Tokens};
use rehearsal_lm::Message;
use serde_json::Value;

use super::Unusable;
use super::encode::{Encoder, Said, said};
use super::rows::Row;

/// A pair to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct PairRow {
    pub chosen: Tokens,
    pub rejected: Tokens,
    /// `score_chosen - score_rejected`, or `margin`.
    pub score_gap: Option<f64>,
}

/// A pair.
pub fn pair(row: &Row, encoder: &Encoder<'_>) -> Result<PairRow, Unusable> {
    let (prompt, chosen, rejected) = texts(&row.columns)?;
    let mut both = encoder.exchanges(&prompt, &[&chosen, &rejected])?;
    let (Some(rejected), Some(chosen)) = (both.pop(), both.pop()) else {
        return Err(Unusable::Bad("has no pair".into()));
    };
    if chosen == rejected {
        return Err(Unusable::Bad("has the same tokens in `chosen` and `rejected`".into()));
    }
    Ok(PairRow { chosen, rejected, score_gap: gap(&row.columns)? })
}

/// A ranking of two or more completions.
pub fn ranking(row: &Row, encoder: &Encoder<'_>) -> Result<Ranking, Unusable> {
    if row.columns.get("completions").is_none() {
        let PairRow { chosen, rejected, score_gap } = pair(row, encoder)?;
        let probability = number(&row.columns, "probability")?;
        if let Some(p) = probability.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(Unusable::Bad(format!("has a `probability` of {p}; it must lie from 0 to 1")));
        }
        let ranks = vec![1, 2];
        return Ok(Ranking { completions: vec![chosen, rejected], ranks, margin: score_gap, probability });
    }
    let bad = |reason: &str| Unusable::Bad(reason.into());
    let prompt = said(&row.columns, "prompt")?;
    let texts: Option<Vec<String>> =
        row.columns["completions"].as_array().and_then(|all| all.iter().map(answer).collect());
    let texts = texts.ok_or_else(|| bad("has `completions` that are no list of texts"))?;
    let ranks: Option<Vec<u32>> = row.columns["ranks"]
        .as_array()
        .and_then(|all| all.iter().map(|r| r.as_u64().and_then(|r| u32::try_from(r).ok())).collect());
    let ranks = ranks.ok_or_else(|| bad("has no list of whole numbers in `ranks`"))?;
    if texts.len() != ranks.len() || texts.len() < 2 {
        return Err(Unusable::Bad(format!(
            "has {} completions and {} ranks; two or more each are needed",
            texts.len(),
            ranks.len()
        )));
    }
    if ranks.iter().all(|r| *r == ranks[0]) {
        return Err(bad("has a ranking in which all tie"));
    }
    let completions = encoder.exchanges(&prompt, &texts.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(Ranking { completions, ranks, margin: None, probability: None })
}

/// The text of an answer: a text, or the last message of a list.
pub fn answer(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(messages) => messages.last()?["content"].as_str().map(String::from),
        _ => None,
    }
}

/// Prompt, chosen and rejected. Whole conversations without a prompt of their own share their beginning.
pub fn texts(columns: &Value) -> Result<(Said, String, String), String> {
    let (chosen, rejected) = (said(columns, "chosen")?, said(columns, "rejected")?);
    let last = |messages: &[Message]| messages.last().map(|m| m.content.clone()).unwrap_or_default();
    if columns.get("prompt").is_some() {
        let text = |said: Said| match said {
            Said::Text(text) => text,
            Said::Messages(messages) => last(&messages),
        };
        let (chosen, rejected) = (text(chosen), text(rejected));
        if chosen == rejected {
            return Err("has the same text in `chosen` and `rejected`".into());
        }
        return Ok((said(columns, "prompt")?, chosen, rejected));
    }
    let (Said::Messages(chosen), Said::Messages(rejected)) = (chosen, rejected) else {
        return Err("has no column `prompt`".into());
    };
    let n = chosen.len().min(rejected.len());
    let shared = (0..n).take_while(|&i| chosen[i] == rejected[i]).count();
    if shared == 0 || shared + 1 != chosen.len() || shared + 1 != rejected.len() {
        return Err("has no `prompt`, and conversations that differ in more than their last message".into());
    }
    Ok((Said::Messages(chosen[..shared].to_vec()), last(&chosen), last(&rejected)))
}

fn gap(columns: &Value) -> Result<Option<f64>, String> {
    Ok(match (number(columns, "score_chosen")?, number(columns, "score_rejected")?) {
        (Some(chosen), Some(rejected)) => Some(chosen - rejected),
        _ => number(columns, "margin")?,
    })
}

/// A number that may be absent.
fn number(columns: &Value, column: &str) -> Result<Option<f64>, String> {
    match columns.get(column).filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(value) => value.as_f64().map(Some).ok_or(format!("has a `{column}` that is no number")),
    }
}
