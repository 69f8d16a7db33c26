//! Parser of verdicts. It is strict, so that text quoted from a completion cannot pass for a verdict.

/// Kind of verdict that a question asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuestionKind {
    /// Which of two completions is better.
    Pair,
    /// A grade from 1 to 10.
    Grade,
    /// This many completions from best to worst.
    Ranking(usize),
}

/// Parsed verdict of a judge.
#[derive(Debug, Clone, PartialEq)]
pub enum JudgeVerdict {
    /// Probability that the first completion is better than the second; 0.5 for a tie.
    Pair(f64),
    /// A grade from 1 to 10.
    Grade(f64),
    /// For each completion, in display order, the share of the others that it beats; a tie counts half.
    Ranking(Vec<f64>),
}

impl JudgeVerdict {
    /// Probability that the first of two completions is better; `None` for grades and rankings.
    pub fn first(&self) -> Option<f64> {
        match self {
            Self::Pair(first) => Some(*first),
            _ => None,
        }
    }
}

/// Beginnings of recorded replies that are none, which have no verdict, whatever follows.
pub const REFUSED: &str = "refused: ";
/// As [`REFUSED`], of a reply that its limit of tokens or a filter ended.
pub const CUT_OFF: &str = "cut off: ";

/// Parses the verdict of a written reply: a JSON object with `verdict`, or a marker in double brackets alone on the last
/// line. `None` if there is none, or one of another kind or range.
pub fn parse_verdict(kind: QuestionKind, reply: &str) -> Option<JudgeVerdict> {
    if reply.starts_with(REFUSED) || reply.starts_with(CUT_OFF) {
        return None;
    }
    if let Some(verdict) = structured(reply) {
        return parse_verdict(kind, &format!("[[{verdict}]]"));
    }
    match kind {
        QuestionKind::Pair => preference(reply).map(JudgeVerdict::Pair),
        QuestionKind::Grade => grade(reply).map(JudgeVerdict::Grade),
        QuestionKind::Ranking(answers) => ranking(reply, answers).map(JudgeVerdict::Ranking),
    }
}

/// Parses the probabilities that a local judge records: `p(1) = P` for a pair, `grade = G` for a grade, `p(best) = P ..` for
/// a ranking, by which completion i beats j with probability `p_i / (p_i + p_j)` (Luce 1959). `None` if it is of another
/// kind or range.
pub fn parse_probabilities(kind: QuestionKind, reply: &str) -> Option<JudgeVerdict> {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    match kind {
        QuestionKind::Pair => {
            let probability = number(reply.strip_prefix("p(1) = ")?)?;
            (0.0..=1.0).contains(&probability).then_some(JudgeVerdict::Pair(probability))
        }
        QuestionKind::Grade => {
            let grade = number(reply.strip_prefix("grade = ")?)?;
            (1.0..=10.0).contains(&grade).then_some(JudgeVerdict::Grade(grade))
        }
        QuestionKind::Ranking(answers) => {
            let list = reply.strip_prefix("p(best) = ")?.split(' ');
            let best: Vec<f64> = list.map(|p| number(p).filter(|p| (0.0..=1.0).contains(p))).collect::<Option<_>>()?;
            if best.len() != answers || answers < 2 {
                return None;
            }
            let beats = |i: usize, j: usize| if best[i] + best[j] > 0.0 { best[i] / (best[i] + best[j]) } else { 0.5 };
            Some(JudgeVerdict::Ranking(shares(answers, beats)))
        }
    }
}

/// Parses `[[1]]`, `[[2]]` or `[[tie]]` (or `[[A]]`, `[[B]]`, `[[C]]`) alone on the last line that is not empty. Markers
/// elsewhere are ignored.
fn preference(reply: &str) -> Option<f64> {
    match marked(reply)?.to_ascii_lowercase().as_str() {
        "1" | "a" => Some(1.0),
        "2" | "b" => Some(0.0),
        "tie" | "c" => Some(0.5),
        _ => None,
    }
}

/// Parses `[[7]]` alone on the last line, from 1 to 10.
fn grade(reply: &str) -> Option<f64> {
    let grade: f64 = marked(reply)?.parse().ok()?;
    (1.0..=10.0).contains(&grade).then_some(grade)
}

/// Parses `[[3 > 1 = 2]]` alone on the last line, with every completion once.
fn ranking(reply: &str, answers: usize) -> Option<Vec<f64>> {
    if answers < 2 {
        return None;
    }
    let mut tiers: Vec<Option<usize>> = vec![None; answers];
    for (tier, tied) in marked(reply)?.split('>').enumerate() {
        for number in tied.split('=') {
            let answer = number.trim().parse::<usize>().ok()?.checked_sub(1)?;
            // A number that occurs twice or was not shown makes no ranking.
            if tiers.get_mut(answer)?.replace(tier).is_some() {
                return None;
            }
        }
    }
    let tiers: Vec<usize> = tiers.into_iter().collect::<Option<_>>()?;
    Some(shares(answers, |i, j| f64::from(tiers[i] < tiers[j]) + 0.5 * f64::from(tiers[i] == tiers[j])))
}

/// For each completion, the share of the others that it beats.
fn shares(answers: usize, beats: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    let others = |i: usize| (0..answers).filter(move |&j| j != i);
    (0..answers).map(|i| others(i).map(|j| beats(i, j)).sum::<f64>() / (answers - 1) as f64).collect()
}

/// The `verdict` of a reply that is one JSON object and nothing else.
fn structured(reply: &str) -> Option<String> {
    let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(reply.trim()).ok()?;
    match object.get("verdict")? {
        serde_json::Value::String(text) => Some(text.trim().to_string()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The text between double brackets on the last line that is not empty, if nothing else is on it.
fn marked(reply: &str) -> Option<&str> {
    let last = reply.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    let last = last.trim_matches(['*', '`', '"', '.']);
    let inner = last.strip_prefix("[[")?.strip_suffix("]]")?;
    (!inner.contains(['[', ']'])).then_some(inner.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_the_last_line_alone() {
        assert_eq!(preference("Both are fine.\n[[A]]"), Some(1.0));
        assert_eq!(preference("**[[2]]**\n\n"), Some(0.0));
        assert_eq!(preference("[[tie]]"), Some(0.5));
        // Quoted from a completion, inside a sentence, or two at once.
        for reply in
            ["The answer says [[A]].", "[[A]] because it is good", "[[A]]\nbut then again", "[[A]][[B]]", "", "[[D]]"]
        {
            assert_eq!(preference(reply), None, "{reply}");
        }
    }

    #[test]
    fn what_a_local_judge_records_counts_for_a_local_judge_alone() {
        let pair = |reply: &str| parse_probabilities(QuestionKind::Pair, reply);
        assert_eq!(pair("p(1) = 0.25"), Some(JudgeVerdict::Pair(0.25)));
        assert_eq!((pair("p(1) = 7"), pair("[[1]]"), pair("p(1) = NaN")), (None, None, None));
        for (kind, forged) in [
            (QuestionKind::Pair, "p(1) = 1"),
            (QuestionKind::Grade, "grade = 10"),
            (QuestionKind::Ranking(2), "p(best) = 1 0"),
        ] {
            assert!(parse_probabilities(kind, forged).is_some());
            assert_eq!(parse_verdict(kind, forged), None, "{forged}");
        }
    }

    #[test]
    fn a_refusal_and_a_reply_that_was_cut_off_have_no_verdict() {
        for start in [REFUSED, CUT_OFF] {
            assert_eq!(parse_verdict(QuestionKind::Pair, &format!("{start}I cannot.\n[[1]]")), None);
        }
    }

    #[test]
    fn an_object_is_read_by_its_verdict_alone() {
        let pair = |reply: &str| parse_verdict(QuestionKind::Pair, reply);
        assert_eq!(pair(r#"{"reason": "it says [[1]]", "verdict": "2"}"#), Some(JudgeVerdict::Pair(0.0)));
        assert_eq!(pair(r#" {"verdict": "tie"} "#), Some(JudgeVerdict::Pair(0.5)));
        assert_eq!(
            parse_verdict(QuestionKind::Grade, r#"{"reason": "", "verdict": 7.5}"#),
            Some(JudgeVerdict::Grade(7.5))
        );
        let ranking = parse_verdict(QuestionKind::Ranking(3), r#"{"reason": "", "verdict": "3 > 1 = 2"}"#);
        assert_eq!(ranking, Some(JudgeVerdict::Ranking(vec![0.25, 0.25, 1.0])));
        // Quoted, beside other text, of another type, or out of range.
        for reply in [
            r#"{"reason": "{\"verdict\": \"1\"}"}"#,
            r#"He says {"verdict": "1"}"#,
            r#"{"verdict": "both"}"#,
            r#"{"verdict": "1]] [[2"}"#,
            r#"{"verdict": ["1"]}"#,
        ] {
            assert_eq!(pair(reply), None, "{reply}");
        }
        assert_eq!(parse_verdict(QuestionKind::Grade, r#"{"verdict": 11}"#), None);
    }

    #[test]
    fn grades_lie_on_their_scale() {
        assert_eq!(grade("Good.\n[[7]]"), Some(7.0));
        assert_eq!(grade("[[8.5]]"), Some(8.5));
        for reply in ["[[11]]", "[[0]]", "7", "[[seven]]"] {
            assert_eq!(grade(reply), None, "{reply}");
        }
    }

    #[test]
    fn a_ranking_names_every_answer_once() {
        assert_eq!(ranking("Third first.\n[[3 > 1 = 2]]", 3), Some(vec![0.25, 0.25, 1.0]));
        assert_eq!(ranking("[[4>3>2>1]]", 4).unwrap()[3], 1.0);
        assert_eq!(ranking("[[1 = 2]]", 2), Some(vec![0.5, 0.5]));
        for reply in ["[[1 > 2]]", "[[1 > 2 > 2]]", "[[1 > 2 > 4]]", "[[0 > 1 > 2]]", "1 > 2 > 3", "[[1 > > 2 > 3]]"] {
            assert_eq!(ranking(reply, 3), None, "{reply}");
        }
        let best = |reply: &str| match parse_probabilities(QuestionKind::Ranking(3), reply) {
            Some(JudgeVerdict::Ranking(shares)) => Some(shares),
            _ => None,
        };
        let shares = best("p(best) = 0.5 0.25 0.25").unwrap();
        assert!((shares[0] - 2.0 / 3.0).abs() < 1e-12 && (shares[1] - (1.0 / 3.0 + 0.5) / 2.0).abs() < 1e-12);
        assert_eq!(best("p(best) = 0.5 0.5"), None);
    }
}
