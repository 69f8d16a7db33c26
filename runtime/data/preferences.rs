//! Rows of preferences: `prompt`, `chosen`, `rejected`, or `prompt`, `completions`, `ranks`.

use rehearsal_actors::{Ranking, Tokens};
use serde_json::Value;

use super::columns::{self, number, text_or_messages};
use super::dropped::Unusable;
use super::rows::Row;
use super::tokenize::RowTokenizer;

/// A tokenised preference pair.
#[derive(Debug, Clone, PartialEq)]
pub struct PairRow {
    /// Prompt and chosen completion.
    pub chosen: Tokens,
    /// Prompt and rejected completion.
    pub rejected: Tokens,
    /// `score_chosen - score_rejected`, or `margin`.
    pub score_gap: Option<f64>,
}

/// Tokenises a pair.
pub fn pair(row: &Row, tokenizer: &RowTokenizer<'_>) -> Result<PairRow, Unusable> {
    let (prompt, chosen, rejected) = columns::pair(&row.columns)?;
    let mut both = tokenizer.completions(&prompt, &[&chosen, &rejected])?;
    let (Some(rejected), Some(chosen)) = (both.pop(), both.pop()) else {
        return Err(Unusable::Bad("has no pair".into()));
    };
    if chosen == rejected {
        return Err(Unusable::Bad("has the same tokens in `chosen` and `rejected`".into()));
    }
    Ok(PairRow { chosen, rejected, score_gap: score_gap(&row.columns)? })
}

/// Tokenises a ranking of two or more completions. A pair is a ranking of two.
pub fn ranking(row: &Row, tokenizer: &RowTokenizer<'_>) -> Result<Ranking, Unusable> {
    if row.columns.get("completions").is_none() {
        let PairRow { chosen, rejected, score_gap } = pair(row, tokenizer)?;
        let probability = number(&row.columns, "probability")?;
        if let Some(p) = probability.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(Unusable::Bad(format!("has a `probability` of {p}; it must be from 0 to 1")));
        }
        let ranks = vec![1, 2];
        return Ok(Ranking { completions: vec![chosen, rejected], ranks, margin: score_gap, probability });
    }
    let bad = |reason: &str| Unusable::Bad(reason.into());
    let prompt = text_or_messages(&row.columns, "prompt")?;
    let texts = columns::completions(&row.columns)?;
    let ranks: Option<Vec<u32>> = row.columns["ranks"]
        .as_array()
        .and_then(|all| all.iter().map(|r| r.as_u64().and_then(|r| u32::try_from(r).ok())).collect());
    let ranks = ranks.ok_or_else(|| bad("has no list of whole numbers in `ranks`"))?;
    if texts.len() != ranks.len() || texts.len() < 2 {
        return Err(Unusable::Bad(format!(
            "has {} completions and {} ranks; it needs two or more, and a rank for each",
            texts.len(),
            ranks.len()
        )));
    }
    if ranks.iter().all(|r| *r == ranks[0]) {
        return Err(bad("has a ranking in which all tie"));
    }
    let completions = tokenizer.completions(&prompt, &texts.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(Ranking { completions, ranks, margin: None, probability: None })
}

fn score_gap(columns: &Value) -> Result<Option<f64>, String> {
    Ok(match (number(columns, "score_chosen")?, number(columns, "score_rejected")?) {
        (Some(chosen), Some(rejected)) => Some(chosen - rejected),
        _ => number(columns, "margin")?,
    })
}
