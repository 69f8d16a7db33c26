//! `[reward]`: rules that a program can check, and the weighted sum of all of a job's rewards.

use std::sync::Arc;

use regex::Regex;
use rehearsal_actors::{Judged, Placement, Reward, RewardError, Sample};
use rehearsal_lm::generate::Finish;

use crate::config::RewardConfig;

/// Names of all rules, as `reward.rules` takes them.
pub const NAMES: [&str; 5] = ["length_window", "ends_properly", "matches", "exact_answer", "distinct_words"];

/// One rule.
enum Rule {
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
}

impl Rule {
    /// Score of one completion. Fails if the rule needs a reference answer and there is none.
    fn score(&self, sample: &Sample) -> Result<f64, String> {
        let text = sample.completion.as_str();
        Ok(match self {
            Rule::LengthWindow { min, max } => {
                let (words, min, max) = (text.split_whitespace().count() as f64, *min as f64, *max as f64);
                let outside = if words < min { (min - words) / min } else { ((words - max) / max).max(0.0) };
                (1.0 - outside).max(0.0)
            }
            Rule::EndsProperly => {
                let not_truncated = sample.finish != Finish::Length;
                let is_sentence = text.trim_end().ends_with(['.', '!', '?', '"', ')', '`']);
                (f64::from(not_truncated) + f64::from(is_sentence)) / 2.0
            }
            Rule::Matches(pattern) => f64::from(pattern.is_match(text)),
            Rule::ExactAnswer => {
                let reference = sample.answer.as_deref().ok_or("the prompt's row has no answer to compare with")?;
                let number = last_number(reference)
                    .ok_or_else(|| format!("the reference answer `{reference}` has no number"))?;
                f64::from(last_number(text) == Some(number))
            }
            Rule::DistinctWords => text.split_whitespace().collect::<std::collections::BTreeSet<_>>().len() as f64,
        })
    }
}

/// Last number of a text; commas between digits are ignored.
fn last_number(text: &str) -> Option<f64> {
    let is_part = |c: char| c.is_ascii_digit() || matches!(c, ',' | '.' | '-');
    text.split(|c| !is_part(c))
        .filter_map(|word| word.replace(',', "").trim_end_matches('.').parse::<f64>().ok())
        .next_back()
}

/// Weighted sum of rewards. Scores are `Σ weight x score`; reasons and exchanges are joined.
pub(crate) struct WeightedReward {
    /// Names of the parts, joined by ` + `.
    name: String,
    parts: Vec<(f64, Arc<dyn Reward>)>,
}

impl WeightedReward {
    /// Sums rewards by their weights. A single reward of weight 1 is passed through unchanged.
    pub fn new(parts: Vec<(f64, Arc<dyn Reward>)>) -> Self {
        let names: Vec<&str> = parts.iter().map(|(_, part)| part.name()).collect();
        Self { name: names.join(" + "), parts }
    }
}

impl Reward for WeightedReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn compares(&self) -> bool {
        self.parts.iter().any(|(_, part)| part.compares())
    }

    fn occupies(&self) -> Vec<Placement> {
        self.parts.iter().flat_map(|(_, part)| part.occupies()).collect()
    }

    fn patience(&self) -> Option<std::time::Duration> {
        self.parts.iter().filter_map(|(_, part)| part.patience()).max()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        if let [(1.0, only)] = self.parts.as_slice() {
            return only.score(samples);
        }
        let mut sums = vec![Judged::default(); samples.len()];
        for (weight, part) in &self.parts {
            let judged = part.score(samples)?;
            if judged.len() != samples.len() {
                let (name, found, wanted) = (part.name().to_string(), judged.len(), samples.len());
                return Err(RewardError::Count { name, found, wanted });
            }
            for (sum, judged) in sums.iter_mut().zip(judged) {
                sum.score += weight * judged.score;
                let separator = if sum.reason.is_empty() { "" } else { " | " };
                let reason = format!("{separator}{weight} x {:.4} by {} {}", judged.score, part.name(), judged.reason);
                sum.reason.push_str(reason.trim_end());
                sum.exchanges.extend(judged.exchanges);
            }
        }
        Ok(sums)
    }
}

/// The weighted sum of rules.
pub struct Rules {
    rules: Vec<(String, f64, Rule)>,
}

impl Rules {
    /// Builds the rules of a validated configuration. Fails on an unknown name or an invalid pattern.
    pub fn new(config: &RewardConfig) -> Result<Self, String> {
        let rule = |name: &str| -> Result<Rule, String> {
            Ok(match name {
                "length_window" => Rule::LengthWindow { min: config.words_min, max: config.words_max },
                "ends_properly" => Rule::EndsProperly,
                "matches" => {
                    let pattern = config.pattern.as_deref().ok_or("`matches` needs `reward.pattern`")?;
                    Rule::Matches(Regex::new(pattern).map_err(|e| e.to_string())?)
                }
                "exact_answer" => Rule::ExactAnswer,
                "distinct_words" => Rule::DistinctWords,
                other => return Err(format!("there is no rule `{other}`; there are {}", NAMES.join(", "))),
            })
        };
        let rules = config.rules.iter().zip(&config.weights).map(|(name, &w)| Ok((name.clone(), w, rule(name)?)));
        Ok(Self { rules: rules.collect::<Result<_, String>>()? })
    }

    fn score_one(&self, sample: &Sample) -> Result<Judged, RewardError> {
        let mut total = 0.0;
        let mut reasons = Vec::with_capacity(self.rules.len());
        for (name, weight, rule) in &self.rules {
            let failed = |reason| RewardError::Failed { name: name.clone(), row: sample.row, reason };
            let score = rule.score(sample).map_err(failed)?;
            total += weight * score;
            reasons.push(format!("{name} {score:.3}"));
        }
        Ok(Judged::new(total, reasons.join(", ")))
    }
}

impl Reward for Rules {
    fn name(&self) -> &str {
        "rules"
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        samples.iter().map(|s| self.score_one(s)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::methods::RewardModelsConfig;

    fn score(rule: Rule, completion: &str, finish: Finish, answer: Option<&str>) -> Result<f64, String> {
        let (prompt, completion, answer) = (String::new(), completion.to_string(), answer.map(String::from));
        rule.score(&Sample { prompt, completion, finish, answer, ..Sample::default() })
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
    fn rules_are_weighted_and_give_reasons() {
        let config = RewardConfig {
            models: RewardModelsConfig::default(),
            rules: vec!["matches".into(), "distinct_words".into()],
            weights: vec![2.0, 0.5],
            words_min: 1,
            words_max: 9,
            pattern: Some("(?i)please".into()),
        };
        let rules = Rules::new(&config).unwrap();
        let (prompt, completion) = (String::new(), "Please do do it".to_string());
        let judged = rules.score_one(&Sample { prompt, completion, ..Sample::default() }).unwrap();
        assert_eq!(judged.score, 3.5);
        assert_eq!(judged.reason, "matches 1.000, distinct_words 3.000");
    }
}
