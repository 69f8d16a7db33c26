//! A job's ledger as rows of data, and rows of data as a ledger.

use std::path::Path;

use rehearsal_store::{Preference, Prompt, Query, Store, Turn};
use serde_json::{Value, json};

use super::encode::{Said, said};
use super::rows::Row;
use crate::error::{Error, Result};

/// What is wanted of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// TRL's `prompt`, `chosen`, `rejected`; ties are none.
    Pairs,
    /// `prompt`, `completions`, `ranks`; a ranking in which all tie is none.
    Rankings,
    /// `prompt`, `completion`: what people wrote themselves.
    Demonstrations,
    /// Everything: scores, reasons, who was asked what in which order, and what it cost.
    Verdicts,
}

/// Whether a path names a directory with a ledger in it.
pub fn is_ledger(path: &Path) -> bool {
    path.join("store").is_dir()
}

/// The rows of a directory's ledger.
pub fn rows(directory: &Path, shape: Shape) -> Result<Vec<Row>> {
    let (store, _) = Store::open(directory)?;
    let mut rows = Vec::new();
    for preference in store.query(Query::default())? {
        let preference = preference?;
        let place = format!("verdict {} of step {}", preference.index, preference.step);
        if let Some(columns) = row(&preference, shape) {
            rows.push(Row { columns, place, index: rows.len() as u64 });
        }
    }
    Ok(rows)
}

/// A verdict as a row, if it is one of that shape.
pub fn row(p: &Preference, shape: Shape) -> Option<Value> {
    let said = |text: &str| match &p.prompt {
        Prompt::Text(_) => json!(text),
        Prompt::Conversation(_) => json!([{"role": "assistant", "content": text}]),
    };
    let prompt = match &p.prompt {
        Prompt::Text(text) => json!(text),
        Prompt::Conversation(turns) => json!(turns),
    };
    let origin = json!({"step": p.step, "policy_version": p.policy_version, "judge": p.judge});
    let mut row = match shape {
        Shape::Pairs => {
            let (won, lost) = p.pair?;
            let text = |i: u32| said(&p.completions[i as usize]);
            json!({
                "prompt": prompt, "chosen": text(won), "rejected": text(lost),
                "score_chosen": p.scores[won as usize], "score_rejected": p.scores[lost as usize],
            })
        }
        Shape::Rankings => {
            let ranks = p.ranks();
            if ranks.len() < 2 || ranks.iter().all(|r| *r == ranks[0]) {
                return None;
            }
            let completions: Vec<Value> = p.completions.iter().map(|c| said(c)).collect();
            json!({"prompt": prompt, "completions": completions, "ranks": ranks, "scores": p.scores})
        }
        Shape::Demonstrations if p.is_demonstration() => {
            json!({"prompt": prompt, "completion": said(&p.completions[0])})
        }
        Shape::Demonstrations => return None,
        Shape::Verdicts => json!({
            "prompt": prompt, "completions": p.completions, "scores": p.scores, "reasons": p.reasons,
            "pair": p.pair.map(|(won, lost)| [won, lost]), "disagreement": p.disagreement(),
            "row": p.row, "index": p.index, "time_ms": p.time_ms, "exchanges": p.exchanges,
        }),
    };
    if let (Some(row), Value::Object(origin)) = (row.as_object_mut(), origin) {
        row.extend(origin);
    }
    Some(row)
}

/// A verdict, or a demonstration, from a row in one of the first three shapes.
pub fn preference(columns: &Value, judge: &str) -> std::result::Result<Preference, String> {
    let prompt = |said: Said| match said {
        Said::Text(text) => Prompt::Text(text),
        Said::Messages(messages) => {
            Prompt::Conversation(messages.into_iter().map(|m| Turn { role: m.role, content: m.content }).collect())
        }
    };
    let has = |column: &str| columns.get(column).is_some();
    let number = |column: &str| columns[column].as_f64();
    let judge = columns["judge"].as_str().unwrap_or(judge).to_string();
    if has("completions") {
        let texts: Option<Vec<String>> =
            columns["completions"].as_array().and_then(|all| all.iter().map(super::preferences::answer).collect());
        let completions = texts.ok_or("has `completions` that are no list of texts")?;
        let numbers =
            |column: &str| -> Option<Vec<f64>> { columns[column].as_array()?.iter().map(Value::as_f64).collect() };
        let scores = numbers("scores").or_else(|| {
            let last = completions.len() as f64;
            numbers("ranks").map(|ranks| ranks.into_iter().map(|rank| last - rank).collect())
        });
        let scores = scores.ok_or("has no list of numbers in `ranks` or `scores`")?;
        if scores.len() != completions.len() || scores.len() < 2 {
            return Err(format!(
                "has {} completions and {} ranks; two or more each are needed",
                completions.len(),
                scores.len()
            ));
        }
        return Ok(ranked(prompt(said(columns, "prompt")?), completions, scores, judge));
    }
    if has("completion") {
        let completion =
            super::preferences::answer(&columns["completion"]).ok_or("has a `completion` that is no text")?;
        let prompt = prompt(said(columns, "prompt")?);
        return Ok(Preference { prompt, completions: vec![completion], judge, ..Preference::default() });
    }
    let (asked, chosen, rejected) = super::preferences::texts(columns)?;
    let (won, lost) = match (number("score_chosen"), number("score_rejected")) {
        (Some(won), Some(lost)) => (won, lost),
        _ => (number("margin").unwrap_or(1.0), 0.0),
    };
    let pair = Some((0, 1));
    Ok(Preference { pair, ..ranked(prompt(asked), vec![chosen, rejected], vec![won, lost], judge) })
}

/// A verdict by scores: the best meets the worst, unless all tie.
pub fn ranked(prompt: Prompt, completions: Vec<String>, scores: Vec<f64>, judge: String) -> Preference {
    let by = |better: fn(f64, f64) -> bool| {
        (1..scores.len()).fold(0, |best, i| if better(scores[i], scores[best]) { i } else { best })
    };
    let (won, lost) = (by(|a, b| a > b), by(|a, b| a < b));
    let pair = (scores.get(won) != scores.get(lost)).then_some((won as u32, lost as u32));
    let reasons = vec![String::new(); completions.len()];
    Preference { prompt, completions, scores, reasons, pair, judge, ..Preference::default() }
}

/// Adds the rows of a file to a ledger, after what is there; how many, and what was left out and why.
pub fn import(store: &mut Store, file: &Path, judge: &str) -> Result<(u64, super::Dropped)> {
    let mut step = store.query(Query::default())?.last().transpose()?.map_or(0, |p| p.step + 1);
    let (mut added, mut dropped) = (Vec::new(), super::Dropped::default());
    let now = crate::run::now_ms();
    for row in super::rows::open(file, Shape::Verdicts)? {
        let row = row?;
        match preference(&row.columns, judge) {
            Ok(preference) => {
                added.push(Preference { step, row: row.index, time_ms: now, ..preference });
                step += 1;
            }
            Err(reason) => dropped.add(reason, &row.place),
        }
    }
    if added.is_empty() {
        let reasons: Vec<String> =
            dropped.0.iter().map(|(reason, d)| format!("{} {reason} ({} first)", d.rows, d.first)).collect();
        let message = format!("no row can be used: {}", reasons.join(", "));
        return Err(Error::Prompts { file: file.into(), message });
    }
    for part in added.chunks(256) {
        store.log_preferences(part)?;
    }
    Ok((added.len() as u64, dropped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_becomes_a_row_and_a_row_a_verdict() {
        let turns = vec![Turn { role: "user".into(), content: "Who?".into() }];
        let completions = ["a", "b", "c"].map(String::from).to_vec();
        let whole = ranked(Prompt::Conversation(turns), completions, vec![0.0, 2.0, 2.0], "anna".into());
        assert_eq!(whole.pair, Some((1, 0)));
        for shape in [Shape::Rankings, Shape::Pairs] {
            let columns = row(&whole, shape).unwrap();
            let back = preference(&columns, "").unwrap();
            assert_eq!((&back.prompt, back.judge.as_str(), back.margin()), (&whole.prompt, "anna", 2.0));
            if shape == Shape::Rankings {
                assert_eq!(columns["ranks"], json!([3, 1, 1]));
                assert_eq!(back, whole);
            }
        }
        assert_eq!(row(&whole, Shape::Demonstrations), None);
        let written = preference(&json!({"prompt": "Who?", "completion": "Me."}), "ben").unwrap();
        assert!(written.is_demonstration() && row(&written, Shape::Pairs).is_none());
        assert_eq!(row(&written, Shape::Demonstrations).unwrap()["completion"], "Me.");
        let tie = ranked(Prompt::Text("p".into()), vec!["a".into(), "b".into()], vec![1.0; 2], String::new());
        assert!(row(&tie, Shape::Pairs).is_none() && row(&tie, Shape::Rankings).is_none());
        assert!(row(&tie, Shape::Verdicts).is_some());
    }
}
