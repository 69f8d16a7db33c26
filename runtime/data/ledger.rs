//! Conversion between records of the preference ledger and rows in TRL's columns: export, import, and training on a
//! ledger.

use std::collections::BTreeSet;
use std::path::Path;

use rehearsal_store::{Preference, Prompt, Query, Store};
use serde_json::{Value, json};

use super::columns::{self, completion, text_or_messages};
use super::dropped::Dropped;
use super::rows::{self, Row};
use crate::error::{Error, Result};
use crate::time::now_ms;

/// Kind of rows that records become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `prompt`, `chosen`, `rejected` and scores; without ties.
    Pairs,
    /// `prompt`, `completions`, `ranks`, `scores`; without rankings in which all tie.
    Rankings,
    /// `prompt`, `completion`, of demonstrations that people wrote.
    Demonstrations,
    /// Whole records: scores, reasons, and each exchange with a judge or person, with display order and cost.
    Verdicts,
}

/// Whether a path is a directory with a store.
pub fn is_ledger(path: &Path) -> bool {
    Store::exists(path)
}

/// Reads the rows of a directory's ledger.
pub fn read(directory: &Path, shape: Shape) -> Result<Vec<Row>> {
    let (store, _) = Store::open(directory)?;
    let mut rows = Vec::new();
    for preference in standing(store.query(Query::default())?.collect::<std::result::Result<_, _>>()?) {
        let place = format!("verdict {} of step {}", preference.index, preference.step);
        if let Some(columns) = row(&preference, shape) {
            rows.push(Row { columns, place, index: rows.len() as u64 });
        }
    }
    Ok(rows)
}

/// The records without those that a person overruled.
pub fn standing(mut records: Vec<Preference>) -> Vec<Preference> {
    let overruled: BTreeSet<(u64, u32)> = records.iter().filter_map(|p| Some((p.step, p.overrules()?))).collect();
    records.retain(|p| !overruled.contains(&(p.step, p.index)));
    records
}

/// Converts a record to a row; `None` if it has no row of that kind.
pub fn row(p: &Preference, shape: Shape) -> Option<Value> {
    let completion = |text: &str| match &p.prompt {
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
            let text = |i: u32| completion(&p.completions[i as usize]);
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
            let completions: Vec<Value> = p.completions.iter().map(|c| completion(c)).collect();
            json!({"prompt": prompt, "completions": completions, "ranks": ranks, "scores": p.scores})
        }
        Shape::Demonstrations if p.is_demonstration() => {
            json!({"prompt": prompt, "completion": completion(&p.completions[0])})
        }
        Shape::Demonstrations => return None,
        Shape::Verdicts => json!({
            "prompt": prompt, "completions": p.completions, "scores": p.scores, "reasons": p.reasons,
            "pair": p.pair.map(|(won, lost)| [won, lost]), "disagreement": p.disagreement(),
            "row": p.row, "index": p.index, "overrules": p.overrules(), "time_ms": p.time_ms, "exchanges": p.exchanges,
        }),
    };
    if let (Some(row), Value::Object(origin)) = (row.as_object_mut(), origin) {
        row.extend(origin);
    }
    Some(row)
}

/// Converts a row of pairs, rankings or demonstrations to a record. `judge` is used for a row without a column `judge`.
pub fn preference(columns: &Value, judge: &str) -> std::result::Result<Preference, String> {
    let has = |column: &str| columns.get(column).is_some();
    let number = |column: &str| columns[column].as_f64();
    let judge = columns["judge"].as_str().unwrap_or(judge).to_string();
    if has("completions") {
        let completions = columns::completions(columns)?;
        let numbers =
            |column: &str| -> Option<Vec<f64>> { columns[column].as_array()?.iter().map(Value::as_f64).collect() };
        let scores = numbers("scores").or_else(|| {
            let last = completions.len() as f64;
            numbers("ranks").map(|ranks| ranks.into_iter().map(|rank| last - rank).collect())
        });
        let scores = scores.ok_or("has no list of numbers in `ranks` or `scores`")?;
        if scores.len() != completions.len() || scores.len() < 2 {
            return Err(format!(
                "has {} completions and {} ranks; it needs two or more, and a rank for each",
                completions.len(),
                scores.len()
            ));
        }
        return Ok(ranked(text_or_messages(columns, "prompt")?.into_prompt(), completions, scores, judge));
    }
    if has("completion") {
        let completion = completion(&columns["completion"]).ok_or("has a `completion` that is no text")?;
        let prompt = text_or_messages(columns, "prompt")?.into_prompt();
        return Ok(Preference { prompt, completions: vec![completion], judge, ..Preference::default() });
    }
    let (prompt, chosen, rejected) = columns::pair(columns)?;
    let (won, lost) = match (number("score_chosen"), number("score_rejected")) {
        (Some(won), Some(lost)) => (won, lost),
        _ => (number("margin").unwrap_or(1.0), 0.0),
    };
    let pair = Some((0, 1));
    Ok(Preference { pair, ..ranked(prompt.into_prompt(), vec![chosen, rejected], vec![won, lost], judge) })
}

/// Longest name of a person, in characters.
const NAME_MAX: usize = 40;

/// A person's name without surrounding spaces, if it is valid.
pub fn valid_name(typed: &str) -> std::result::Result<&str, String> {
    let name = typed.trim();
    if name.is_empty() || name.chars().count() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(format!("say who you are, in 1 to {NAME_MAX} characters"));
    }
    Ok(name)
}

/// A person's name in the ledger's `judge` field.
pub fn judge_name(person: &str) -> String {
    format!("person:{person}")
}

/// A record of completions with scores. Its pair is the best completion and the worst, or none if all tie.
pub fn ranked(prompt: Prompt, completions: Vec<String>, scores: Vec<f64>, judge: String) -> Preference {
    let by = |better: fn(f64, f64) -> bool| {
        (1..scores.len()).fold(0, |best, i| if better(scores[i], scores[best]) { i } else { best })
    };
    let (won, lost) = (by(|a, b| a > b), by(|a, b| a < b));
    let pair = (scores.get(won) != scores.get(lost)).then_some((won as u32, lost as u32));
    let reasons = vec![String::new(); completions.len()];
    Preference { prompt, completions, scores, reasons, pair, judge, ..Preference::default() }
}

/// Appends the rows of a file to a ledger. Returns the number of rows, and those left out. Fails if no row can be used.
pub fn import(store: &mut Store, file: &Path, judge: &str) -> Result<(u64, Dropped)> {
    let mut step = store.query(Query::default())?.last().transpose()?.map_or(0, |p| p.step + 1);
    let (mut added, mut dropped) = (Vec::new(), Dropped::default());
    let now = now_ms();
    for row in rows::open(file, Shape::Verdicts)? {
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
        let message = format!("no row can be used: {}", dropped.summary());
        return Err(Error::Prompts { file: file.into(), message });
    }
    for part in added.chunks(256) {
        store.log_preferences(part)?;
    }
    Ok((added.len() as u64, dropped))
}

#[cfg(test)]
mod tests {
    use rehearsal_store::Turn;

    use super::*;

    #[test]
    fn records_become_rows_and_rows_records() {
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
