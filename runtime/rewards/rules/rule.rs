//! One rule: what it checks, and its score.

use regex::Regex;
use rehearsal_actors::Sample;
use rehearsal_lm::generate::Finish;

use super::RuleSource;
#[cfg(feature = "verify")]
use crate::rewards::verify::json::Schema;
#[cfg(feature = "verify")]
use crate::rewards::verify::language::is_language;
use crate::rewards::verify::length::{Cosine, cosine_scaled, soft_overlong};
use crate::rewards::verify::math::{Extraction, is_correct};
use crate::rewards::verify::repetition::repetition;
use crate::rewards::verify::thinking::{after_thinking, is_think_format};

/// Names of all rules, as `reward.rules` takes them.
pub const NAMES: [&str; 13] = [
    "length_window",
    "ends_properly",
    "matches",
    "exact_answer",
    "distinct_words",
    "math_equal",
    "math_after_thinking",
    "math_by_length",
    "think_format",
    "soft_overlong",
    "repetition",
    "json_schema",
    "language",
];

/// One rule.
pub enum Rule {
    /// 1 if the number of words is from `min` to `max`; otherwise 1 minus the distance to the nearer bound as a share
    /// of that bound, but at least 0.
    LengthWindow { min: u64, max: u64 },
    /// Mean of two conditions, 0 or 1 each: the completion was not truncated, and its text ends as a sentence does.
    EndsProperly,
    /// 1 if the pattern matches anywhere, else 0.
    Matches(Regex),
    /// 1 if the last numbers of completion and reference answer are equal (GSM8K), else 0.
    ExactAnswer,
    /// Number of distinct words.
    DistinctWords,
    /// 1 if the answer is mathematically equal to the reference answer, else 0.
    MathEqual(Extraction),
    /// The same of what follows `</think>`; 0 without it.
    MathAfterThinking(Extraction),
    /// The same, scaled by the completion's length.
    MathByLength(Extraction, Cosine),
    /// 1 for `<think>...</think>` and an answer, else 0.
    ThinkFormat,
    /// From 0 to -1 as the completion nears its longest length.
    SoftOverlong { max: usize, cache: usize },
    /// From 0 to `penalty` as n-grams of tokens are repeated.
    Repetition { n: usize, penalty: f64 },
    /// 1 for JSON that a schema allows, else 0.
    #[cfg(feature = "verify")]
    Json(Box<Schema>),
    /// 1 for a completion in a language, else 0.
    #[cfg(feature = "verify")]
    Language(String),
}

impl Rule {
    /// The rule of a name.
    pub fn new(name: &str, settings: &RuleSource) -> Result<Self, String> {
        let place = settings.answer_in;
        let pair = |values: &[f64]| -> Result<[f64; 2], String> {
            values
                .try_into()
                .map_err(|_| "`reward.length_correct` and `reward.length_wrong` have two numbers each".into())
        };
        Ok(match name {
            "length_window" => Self::LengthWindow { min: settings.words_min, max: settings.words_max },
            "ends_properly" => Self::EndsProperly,
            "matches" => {
                let pattern = settings.pattern.as_deref().ok_or("`matches` needs `reward.pattern`")?;
                Self::Matches(Regex::new(pattern).map_err(|e| e.to_string())?)
            }
            "exact_answer" => Self::ExactAnswer,
            "distinct_words" => Self::DistinctWords,
            "math_equal" => Self::MathEqual(place),
            "math_after_thinking" => Self::MathAfterThinking(place),
            "math_by_length" => {
                let (correct, wrong) = (pair(&settings.length_correct)?, pair(&settings.length_wrong)?);
                Self::MathByLength(place, Cosine { tokens_max: settings.tokens_max, correct, wrong })
            }
            "think_format" => Self::ThinkFormat,
            "soft_overlong" => Self::SoftOverlong { max: settings.tokens_max, cache: settings.overlong_cache },
            "repetition" => Self::Repetition { n: settings.ngram, penalty: settings.repetition_penalty },
            #[cfg(feature = "verify")]
            "json_schema" => {
                let path = settings.schema.as_ref().ok_or("`json_schema` needs `reward.schema`")?;
                let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
                Self::Json(Box::new(Schema::new(&text).map_err(|e| format!("{} {e}", path.display()))?))
            }
            #[cfg(feature = "verify")]
            "language" => Self::Language(settings.language.clone().ok_or("`language` needs `reward.language`")?),
            other => return Err(format!("there is no rule `{other}`; there are {}", NAMES.join(", "))),
        })
    }

    /// The score of a completion; `None` if there is none, since the row's answer cannot be read.
    pub fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let text = sample.completion.as_str();
        let answer = || sample.answer.as_deref().ok_or("the prompt's row has no answer to compare with");
        Ok(Some(match self {
            Self::LengthWindow { min, max } => {
                let (words, min, max) = (text.split_whitespace().count() as f64, *min as f64, *max as f64);
                let outside = if words < min { (min - words) / min } else { ((words - max) / max).max(0.0) };
                (1.0 - outside).max(0.0)
            }
            Self::EndsProperly => {
                let not_truncated = sample.finish != Finish::Length;
                let is_sentence = text.trim_end().ends_with(['.', '!', '?', '"', ')', '`']);
                (f64::from(not_truncated) + f64::from(is_sentence)) / 2.0
            }
            Self::Matches(pattern) => f64::from(pattern.is_match(text)),
            Self::ExactAnswer => {
                let wanted = answer()?;
                let wanted = last_number(wanted).ok_or_else(|| format!("the answer `{wanted}` has no number"))?;
                f64::from(last_number(text) == Some(wanted))
            }
            Self::DistinctWords => text.split_whitespace().collect::<std::collections::BTreeSet<_>>().len() as f64,
            Self::MathEqual(place) => return Ok(is_correct(text, answer()?, *place).map(f64::from)),
            Self::MathAfterThinking(place) => match after_thinking(text) {
                Some(text) => return Ok(is_correct(text, answer()?, *place).map(f64::from)),
                None => 0.0,
            },
            Self::MathByLength(place, bounds) => {
                let correct = is_correct(text, answer()?, *place);
                return Ok(correct.map(|correct| cosine_scaled(correct, sample.tokens, bounds)));
            }
            Self::ThinkFormat => f64::from(is_think_format(text)),
            Self::SoftOverlong { max, cache } => soft_overlong(sample.tokens, *max, *cache),
            Self::Repetition { n, penalty } => repetition(&sample.ids.completion, *n, *penalty),
            #[cfg(feature = "verify")]
            Self::Json(schema) => f64::from(schema.allows(text)),
            #[cfg(feature = "verify")]
            Self::Language(code) => f64::from(is_language(text, code).unwrap_or(false)),
        }))
    }
}

/// Last number of a text; commas between digits are ignored.
fn last_number(text: &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_digit() || matches!(c, ',' | '.' | '-');
    text.split(|c| !is_part(c))
        .filter_map(|word| word.replace(',', "").trim_end_matches('.').parse::<f64>().ok())
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(rule: Rule, completion: &str, finish: Finish, answer: Option<&str>) -> Result<f64, String> {
        let (prompt, completion, answer) = (String::new(), completion.to_string(), answer.map(String::from));
        let score = rule.score(&Sample { prompt, completion, finish, answer, ..Sample::default() })?;
        score.ok_or_else(|| "no score".to_string())
    }

    #[test]
    fn a_length_window_decreases_on_both_sides() {
        let window = |text: &str| score(Rule::LengthWindow { min: 2, max: 4 }, text, Finish::Eos, None).unwrap();
        assert_eq!([window(""), window("a"), window("a b"), window("a b c d")], [0.0, 0.5, 1.0, 1.0]);
        assert_eq!([window("a b c d e f"), window(&"a ".repeat(20))], [0.5, 0.0]);
    }

    #[test]
    fn a_proper_end_is_a_stop_and_a_sentence() {
        let ends = |text: &str, finish| score(Rule::EndsProperly, text, finish, None).unwrap();
        assert_eq!(ends("Done.", Finish::Eos), 1.0);
        assert_eq!(ends("Done", Finish::Eos), 0.5);
        assert_eq!(ends("Done.", Finish::Length), 0.5);
        assert_eq!(ends("Do", Finish::Length), 0.0);
    }

    #[test]
    fn an_exact_answer_has_the_same_last_number() {
        let exact = |text: &str, answer| score(Rule::ExactAnswer, text, Finish::Eos, answer).unwrap();
        assert_eq!(exact("3 and 4 make 1,207.", Some("#### 1207")), 1.0);
        assert_eq!(exact("It costs $-3.50", Some("-3.5")), 1.0);
        assert_eq!(exact("12", Some("13")), 0.0);
        assert_eq!(exact("none", Some("13")), 0.0);
        assert!(score(Rule::ExactAnswer, "1", Finish::Eos, None).unwrap_err().contains("no answer"));
    }

    #[test]
    fn a_mathematical_answer_is_compared_or_left_out() {
        let math = |text: &str, answer| score(Rule::MathEqual(Extraction::Boxed), text, Finish::Eos, answer);
        assert_eq!(math("\\boxed{2/4}", Some("$\\frac{1}{2}$")), Ok(1.0));
        assert_eq!(math("\\boxed{2/4}", Some("yes and no")), Err("no score".into()));
        assert!(math("\\boxed{1}", None).unwrap_err().contains("no answer"));
        let thinking = |text: &str| score(Rule::MathAfterThinking(Extraction::Any), text, Finish::Eos, Some("4"));
        assert_eq!((thinking("<think>5</think>4"), thinking("4")), (Ok(1.0), Ok(0.0)));
    }
}
