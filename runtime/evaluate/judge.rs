//! Agreement of a judge with labelled pairs, and with itself in the other order.

use std::path::Path;

use rehearsal_actors::Sample;
use rehearsal_learn::evaluation::agreement::cohen;
use rehearsal_learn::evaluation::judge::{BothOrders, first_position_rate};
use serde::Serialize;

use super::rows::{objects, row_error, text};
use crate::error::{Error, Result};
use crate::judge::{Judge, JudgeVerdict, Reply, Template};

/// Agreement of a judge with labels.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct JudgeReport {
    /// Number of pairs.
    pub pairs: usize,
    /// Share of pairs whose label is the judge's choice over both orders; without pairs labelled as ties.
    pub accuracy: f64,
    /// The same in file order alone.
    pub accuracy_first_order: f64,
    /// Cohen's κ of label and choice over both orders; without pairs labelled as ties.
    pub kappa: Option<f64>,
    /// Share of pairs on which the judge chooses the same completion in both orders.
    pub position_consistency: f64,
    /// Share of verdicts, over both orders, for the completion shown first; 0.5 without position bias.
    pub first_position_rate: f64,
    /// Number of replies without a readable verdict, which count as ties.
    pub unreadable: usize,
}

/// Asks a judge about the first `limit` pairs of a file, in both orders.
///
/// Columns: `prompt` (or `question`), `first` and `second` (or `answer_a`, `answer_b`), `verdict` (or `label`): `1`,
/// `2` or `tie`.
pub fn judge_agreement(judge: &dyn Judge, template: &Template, file: &Path, limit: usize) -> Result<JudgeReport> {
    let mut questions = Vec::new();
    let mut labels = Vec::new();
    for (place, row) in objects(file)?.into_iter().take(limit) {
        let of = |columns: &[&str]| text(&row, columns).map_err(|e| row_error(file, &place, e));
        let prompt = of(&["prompt", "question"])?;
        let sample =
            |completion: &str| Sample { prompt: prompt.into(), completion: completion.into(), ..Sample::default() };
        let (first, second) = (sample(of(&["first", "answer_a"])?), sample(of(&["second", "answer_b"])?));
        questions.extend([template.pair(&first, &second), template.pair(&second, &first)]);
        labels.push(match of(&["verdict", "label"])? {
            "1" | "a" | "A" | "first" => 1i8,
            "2" | "b" | "B" | "second" => -1,
            "tie" | "c" | "C" => 0,
            other => {
                return Err(row_error(
                    file,
                    &place,
                    format!("has the verdict `{other}`; it must be `1`, `2` or `tie`"),
                ));
            }
        });
    }
    if labels.is_empty() {
        return Err(Error::Prompts { file: file.into(), message: "has no rows".into() });
    }
    let replies = judge.ask(&questions).map_err(rehearsal_actors::Error::from)?;
    let unreadable = replies.iter().filter(|r| r.verdict.is_none()).count();
    let verdicts: Vec<BothOrders> = replies
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[a, b]| {
            let first = |r: &Reply| r.verdict.as_ref().and_then(JudgeVerdict::first).unwrap_or(0.5);
            BothOrders { shown_first: first(a), shown_second: 1.0 - first(b) }
        })
        .collect();
    let sign = |p: f64| if p > 0.5 { 1i8 } else { -1 };
    let decided: Vec<(i8, &BothOrders)> =
        labels.iter().copied().zip(&verdicts).filter(|(label, _)| *label != 0).collect();
    let share = |of: &dyn Fn(&BothOrders) -> f64| {
        decided.iter().filter(|(label, v)| sign(of(v)) == *label).count() as f64 / decided.len().max(1) as f64
    };
    let (chosen, labelled): (Vec<i8>, Vec<i8>) = decided.iter().map(|(l, v)| (sign(v.probability()), *l)).unzip();
    Ok(JudgeReport {
        pairs: labels.len(),
        accuracy: share(&BothOrders::probability),
        accuracy_first_order: share(&|v| v.shown_first),
        kappa: cohen(&chosen, &labelled),
        position_consistency: verdicts.iter().filter(|v| v.consistent()).count() as f64 / verdicts.len() as f64,
        first_position_rate: first_position_rate(&verdicts),
        unreadable,
    })
}
