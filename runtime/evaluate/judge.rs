//! Agreement of a judge with labelled pairs, and with itself in the other order.

use std::cmp::Ordering;
use std::path::Path;

use rehearsal_actors::Sample;
use rehearsal_learn::evaluation::agreement::cohen;
use rehearsal_learn::evaluation::judge::{BothOrders, choice, first_position_rate};
use serde::Serialize;

use super::rows::{label, objects, row_error, text};
use crate::error::{Error, Result};
use crate::judge::{Judge, JudgeVerdict, Reply, Template};

/// Agreement of a judge with labels.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct JudgeReport {
    /// Number of pairs.
    pub pairs: usize,
    /// Share of pairs whose label is the judge's choice over both orders; without pairs labelled as ties. A pair on which
    /// the judge chooses neither, by a tie or by an unreadable reply, counts half.
    pub accuracy: f64,
    /// The same in file order alone.
    pub accuracy_first_order: f64,
    /// Cohen's κ of label and choice over both orders; without pairs labelled as ties. The judge's ties are a choice of their
    /// own, as are pairs with an unreadable reply.
    pub kappa: Option<f64>,
    /// Share of pairs on which the judge makes the same choice in both orders: a completion, or a tie. A pair with an
    /// unreadable reply is none of them.
    pub position_consistency: f64,
    /// Share of readable verdicts, over both orders, for the completion shown first; a tie counts half. 0.5 without position
    /// bias.
    pub first_position_rate: f64,
    /// Number of pairs on which the judge's choice over both orders is a tie.
    pub ties: usize,
    /// Number of pairs with a reply without a readable verdict.
    pub failures: usize,
    /// Number of replies without a readable verdict.
    pub unreadable: usize,
}

/// Asks a judge about the first `limit` pairs of a file, in both orders.
///
/// Columns: `prompt` (or `question`), `first` and `second` (or `answer_a`, `answer_b`), `verdict` (or `label`): `1`,
/// `2` or `tie`, as text or number.
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
        labels.push(match label(&row, &["verdict", "label"]).map_err(|e| row_error(file, &place, e))?.as_str() {
            "1" | "a" | "A" | "first" => Choice::First,
            "2" | "b" | "B" | "second" => Choice::Second,
            "tie" | "c" | "C" => Choice::Tie,
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
    let pairs: Vec<(Choice, Choice, bool)> = replies.as_chunks::<2>().0.iter().map(choices).collect();
    let readable: Vec<BothOrders> = replies.as_chunks::<2>().0.iter().filter_map(both_orders).collect();
    let decided: Vec<(Choice, &(Choice, Choice, bool))> =
        labels.iter().copied().zip(&pairs).filter(|(label, _)| *label != Choice::Tie).collect();
    let share = |of: &dyn Fn(&(Choice, Choice, bool)) -> Choice| {
        let credit = |chosen: Choice, label: Choice| match chosen {
            Choice::Tie | Choice::Unreadable => 0.5,
            chosen => f64::from(chosen == label),
        };
        decided.iter().map(|(label, pair)| credit(of(pair), *label)).sum::<f64>() / decided.len().max(1) as f64
    };
    let (chosen, labelled): (Vec<Choice>, Vec<Choice>) = decided.iter().map(|(l, pair)| (pair.0, *l)).unzip();
    let count = |wanted: Choice| pairs.iter().filter(|pair| pair.0 == wanted).count();
    Ok(JudgeReport {
        pairs: labels.len(),
        accuracy: share(&|pair| pair.0),
        accuracy_first_order: share(&|pair| pair.1),
        kappa: cohen(&chosen, &labelled),
        position_consistency: pairs.iter().filter(|pair| pair.2).count() as f64 / pairs.len() as f64,
        first_position_rate: first_position_rate(&readable),
        ties: count(Choice::Tie),
        failures: count(Choice::Unreadable),
        unreadable,
    })
}

/// What a judge or a label says of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    First,
    Second,
    Tie,
    Unreadable,
}

impl Choice {
    /// From the probability that the first completion is better.
    fn of(first: Option<f64>) -> Self {
        match first.and_then(choice) {
            Some(Ordering::Greater) => Self::First,
            Some(Ordering::Less) => Self::Second,
            Some(Ordering::Equal) => Self::Tie,
            None => Self::Unreadable,
        }
    }
}

/// The probabilities of two replies, the second of which was shown the completions in the other order.
fn both_orders([a, b]: &[Reply; 2]) -> Option<BothOrders> {
    let first = |reply: &Reply| reply.verdict.as_ref().and_then(JudgeVerdict::first);
    Some(BothOrders { shown_first: first(a)?, shown_second: 1.0 - first(b)? })
}

/// The choice over both orders and in the first alone, and whether both orders agree.
fn choices(replies: &[Reply; 2]) -> (Choice, Choice, bool) {
    let both = both_orders(replies);
    let first = replies[0].verdict.as_ref().and_then(JudgeVerdict::first);
    (Choice::of(both.map(|b| b.probability())), Choice::of(first), both.is_some_and(|b| b.consistent()))
}

#[cfg(test)]
mod tests {
    use rehearsal_actors::RewardError;
    use rehearsal_store::Usage;

    use super::*;
    use crate::judge::{Question, ReplyFormat};

    /// Says what it is told to, in turn.
    struct Script(Vec<Option<f64>>);

    impl Judge for Script {
        fn id(&self) -> &str {
            "script"
        }

        fn ask(&self, questions: &[Question]) -> std::result::Result<Vec<Reply>, RewardError> {
            let reply = |first: &Option<f64>| Reply {
                raw: String::new(),
                verdict: first.map(JudgeVerdict::Pair),
                usage: Usage::default(),
            };
            Ok(questions.iter().zip(self.0.iter().cycle()).map(|(_, first)| reply(first)).collect())
        }
    }

    fn report(judge: Vec<Option<f64>>, labels: &[&str]) -> JudgeReport {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("labels.jsonl");
        let row = |label: &&str| format!(r#"{{"prompt": "q", "first": "a", "second": "b", "verdict": {label}}}"#);
        std::fs::write(&file, labels.iter().map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let template = Template::new("helpful", None, ReplyFormat::Text).unwrap();
        judge_agreement(&Script(judge), &template, &file, usize::MAX).unwrap()
    }

    #[test]
    fn a_judge_that_cannot_be_read_agrees_with_nobody() {
        // Labels of both kinds, as text and as numbers.
        for label in ["\"2\"", "2", "\"1\"", "1"] {
            let silent = report(vec![None], &[label, label]);
            assert_eq!((silent.accuracy, silent.accuracy_first_order, silent.position_consistency), (0.5, 0.5, 0.0));
            assert_eq!((silent.ties, silent.failures, silent.unreadable), (0, 2, 4));
            let undecided = report(vec![Some(0.5)], &[label]);
            assert_eq!((undecided.accuracy, undecided.position_consistency, undecided.ties), (0.5, 1.0, 1));
            assert_eq!(undecided.first_position_rate, 0.5);
        }
    }

    #[test]
    fn a_consistent_judge_is_right_where_the_label_says_so() {
        // The second reply is about the completions in the other order.
        let right = report(vec![Some(1.0), Some(0.0)], &["1", "\"tie\"", "\"A\""]);
        assert_eq!((right.accuracy, right.position_consistency, right.first_position_rate), (1.0, 1.0, 0.5));
        let biased = report(vec![Some(1.0), Some(1.0)], &["1", "2"]);
        assert_eq!((biased.accuracy, biased.accuracy_first_order, biased.ties), (0.5, 0.5, 2));
        assert_eq!((biased.position_consistency, biased.first_position_rate), (0.0, 1.0));
    }
}
