//! Rules that a program can check, as a source of rewards: `reward.rules`.

use regex::Regex;
use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use rehearsal_lm::generate::Finish;

use super::source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
use crate::config::{Keys, Range, Settings};
use crate::error::{Error, Result};
use crate::futures::BoxFuture;

/// The keys of `[reward]` that belong to rules.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleSource {
    /// Names of rules; empty where the reward comes from elsewhere.
    pub rules: Vec<String>,
    /// One for each rule; empty for 1 each.
    pub weights: Vec<f64>,
    /// Fewest words for the rule `length_window`.
    pub words_min: u64,
    /// Most words for the rule `length_window`.
    pub words_max: u64,
    /// Regular expression for the rule `matches`.
    pub pattern: Option<String>,
}

impl Default for RuleSource {
    fn default() -> Self {
        Self { rules: Vec::new(), weights: Vec::new(), words_min: 1, words_max: 50, pattern: None }
    }
}

impl Settings for RuleSource {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("reward");
        s.texts(
            "rules",
            &mut self.rules,
            "a list of rule names",
            "Rules whose weighted sum is the reward: `length_window`, `ends_properly`, `matches`, `exact_answer`, \
             `distinct_words`. Empty when the program brings a reward of its own.",
        );
        let help = "Weights of the rules; 1 each when left out.";
        s.numbers("weights", &mut self.weights, "one number for each rule", help);
        s.integer("words_min", &mut self.words_min, Range::from(0.0), "`length_window`: words at least.");
        s.integer("words_max", &mut self.words_max, Range::from(1.0), "`length_window`: words at most.");
        let help = "`matches`: what a completion must contain.";
        s.text("pattern", &mut self.pattern, "a regular expression", help);
        for name in self.rules.iter().filter(|name| !NAMES.contains(&name.as_str())) {
            s.problem("rules", format!("names `{name}`; there are {}", NAMES.join(", ")));
        }
        let (weights, rules) = (self.weights.len(), self.rules.len());
        if weights > 0 && weights != rules {
            s.problem("weights", format!("has {weights} numbers for {rules} rules"));
        }
        let (min, max) = (self.words_min, self.words_max);
        if min > max {
            s.problem("words_min", format!("= {min} exceeds `reward.words_max` = {max}"));
        }
        match self.pattern.as_deref().map(Regex::new) {
            Some(Err(e)) => {
                s.problem("pattern", format!("is no regular expression: {}", e.to_string().replace('\n', " ")))
            }
            None if self.rules.iter().any(|r| r == "matches") => {
                s.problem("rules", "has `matches`, which needs `reward.pattern`")
            }
            _ => {}
        }
    }
}

impl RewardSource for RuleSource {
    fn name(&self) -> &'static str {
        "reward.rules"
    }

    fn is_configured(&self) -> bool {
        !self.rules.is_empty()
    }

    fn yields_to_host(&self) -> bool {
        true
    }

    fn load(&self, _: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        Ok(Box::new(Rules::new(self).map_err(|reason| Error::RewardSource { name: "reward.rules", reason })?))
    }
}

impl LoadedReward for Rules {
    fn start<'a>(self: Box<Self>, _: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>> {
        Box::pin(async move { Ok(StartedReward::new(1.0, *self)) })
    }
}

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
    fn score(&self, sample: &Sample) -> std::result::Result<f64, String> {
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
                let wanted = sample.answer.as_deref().ok_or("the prompt's row has no answer to compare with")?;
                let wanted = last_number(wanted).ok_or_else(|| format!("the answer `{wanted}` has no number"))?;
                f64::from(last_number(text) == Some(wanted))
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

/// The weighted sum of rules.
pub struct Rules {
    rules: Vec<(String, f64, Rule)>,
}

impl Rules {
    /// The rules that settings name.
    pub fn new(config: &RuleSource) -> std::result::Result<Self, String> {
        let rule = |name: &str| -> std::result::Result<Rule, String> {
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
        let weight = |i: usize| config.weights.get(i).copied().unwrap_or(1.0);
        let rules = config.rules.iter().enumerate().map(|(i, name)| Ok((name.clone(), weight(i), rule(name)?)));
        Ok(Self { rules: rules.collect::<std::result::Result<_, String>>()? })
    }

    fn score_one(&self, sample: &Sample) -> std::result::Result<Judged, RewardError> {
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

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        samples.iter().map(|s| self.score_one(s)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(rule: Rule, completion: &str, finish: Finish, answer: Option<&str>) -> std::result::Result<f64, String> {
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
        let config = RuleSource {
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
