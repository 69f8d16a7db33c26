//! Rules that a program can check, as a source of rewards: `reward.rules`.

mod rule;

use std::path::PathBuf;

use regex::Regex;
use rehearsal_actors::{Judged, Reward, RewardError, Sample};

pub use self::rule::NAMES;
use self::rule::Rule;
use super::source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
use crate::config::{Keys, Range, Settings};
use crate::error::{Error, Result};
use crate::features::VERIFY;
use crate::futures::BoxFuture;
#[cfg(feature = "verify")]
use crate::rewards::verify::language::{codes, is_language};
use crate::rewards::verify::math::Extraction;

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
    /// Bounds of rules' scores, as `name = min..max`.
    pub clips: Vec<String>,
    /// Where rules of mathematics look for a completion's answer.
    pub answer_in: Extraction,
    /// Longest completion in tokens, for `soft_overlong` and `math_by_length`.
    pub tokens_max: usize,
    /// Tokens before the longest over which `soft_overlong` falls.
    pub overlong_cache: usize,
    /// `math_by_length`: reward of a correct answer of no tokens, and of the longest.
    pub length_correct: Vec<f64>,
    /// `math_by_length`: reward of a wrong answer of no tokens, and of the longest.
    pub length_wrong: Vec<f64>,
    /// `repetition`: tokens of an n-gram.
    pub ngram: usize,
    /// `repetition`: reward of a completion that does nothing else.
    pub repetition_penalty: f64,
    /// `json_schema`: file with the schema.
    pub schema: Option<PathBuf>,
    /// `language`: code of the language.
    pub language: Option<String>,
}

impl Default for RuleSource {
    fn default() -> Self {
        Self {
            rules: Vec::new(),
            weights: Vec::new(),
            words_min: 1,
            words_max: 50,
            pattern: None,
            clips: Vec::new(),
            answer_in: Extraction::Boxed,
            tokens_max: 256,
            overlong_cache: 64,
            length_correct: vec![1.0, 0.5],
            length_wrong: vec![-1.0, -0.5],
            ngram: 3,
            repetition_penalty: -1.0,
            schema: None,
            language: None,
        }
    }
}

/// A rule's name, and the bounds of its score.
type Clip = (String, (f64, f64));

impl RuleSource {
    /// The bounds by the names of rules.
    fn clips(&self) -> std::result::Result<Vec<Clip>, String> {
        let clip = |text: &String| {
            let wrong = || format!("has `{text}`; write `name = min..max` with the name of a rule");
            let (name, bounds) = text.split_once('=').ok_or_else(wrong)?;
            let (min, max) = bounds.split_once("..").ok_or_else(wrong)?;
            let number = |text: &str| text.trim().parse::<f64>().ok().filter(|x| x.is_finite()).ok_or_else(wrong);
            let (name, min, max) = (name.trim(), number(min)?, number(max)?);
            if min <= max && NAMES.contains(&name) { Ok((name.to_string(), (min, max))) } else { Err(wrong()) }
        };
        self.clips.iter().map(clip).collect()
    }

    fn uses(&self, rule: &str) -> bool {
        self.rules.iter().any(|name| name == rule)
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
             `distinct_words`; of answers, `math_equal`, `math_after_thinking`, `math_by_length`; of form, `think_format`, \
             `soft_overlong`, `repetition`, `json_schema`, `language`. docs/methods.md says what each gives. Empty when the program \
             brings a reward of its own.",
        );
        let help = "Weights of the rules; 1 each when left out.";
        s.numbers("weights", &mut self.weights, "one number for each rule", help);
        s.integer("words_min", &mut self.words_min, Range::from(0.0), "`length_window`: words at least.");
        s.integer("words_max", &mut self.words_max, Range::from(1.0), "`length_window`: words at most.");
        let help = "`matches`: what a completion must contain.";
        s.text("pattern", &mut self.pattern, "a regular expression", help);
        let help = "Bounds of rules' scores before they are weighted, such as `repetition = -0.5..0`.";
        s.texts("clips", &mut self.clips, "a list of texts `name = min..max`", help);
        s.choice(
            "answer_in",
            &mut self.answer_in,
            &[("boxed", Extraction::Boxed), ("any", Extraction::Any)],
            "`math_*`: where a completion's answer is: in `\\boxed{}` or in a formula after \"final answer is\", or without either in the \
             last formula or number.",
        );
        let help = "`soft_overlong`, `math_by_length`: longest completion in tokens.";
        s.integer("tokens_max", &mut self.tokens_max, Range::from(1.0), help);
        let help = "`soft_overlong`: the score falls from 0 to -1 over so many tokens before the longest.";
        s.integer("overlong_cache", &mut self.overlong_cache, Range::from(0.0), help);
        let help =
            "`math_by_length`: score of a correct answer of no tokens, and of the longest; half a cosine between them.";
        s.numbers("length_correct", &mut self.length_correct, "two numbers", help);
        let help = "`math_by_length`: the same for a wrong answer.";
        s.numbers("length_wrong", &mut self.length_wrong, "two numbers", help);
        s.integer("ngram", &mut self.ngram, Range::from(1.0), "`repetition`: tokens of an n-gram.");
        let help = "`repetition`: score of a completion that does nothing else.";
        s.number("repetition_penalty", &mut self.repetition_penalty, Range::within(-1e6, 0.0), help);
        s.path("schema", &mut self.schema, "`json_schema`: file with a JSON schema.");
        let help = "`language`: code of ISO 639-3, such as `eng`.";
        s.text("language", &mut self.language, "a code of three letters", help);
        for rule in ["json_schema", "language"].into_iter().filter(|rule| self.uses(rule)) {
            s.requires("rules", VERIFY.enabled, VERIFY);
            let missing = if rule == "language" { self.language.is_none() } else { self.schema.is_none() };
            if missing {
                let key = if rule == "language" { "language" } else { "schema" };
                s.problem("rules", format!("has `{rule}`, which needs `reward.{key}`"));
            }
        }
        #[cfg(feature = "verify")]
        if let Some(code) = self.language.as_ref().filter(|code| is_language("", code).is_none()) {
            s.problem("language", format!("= \"{code}\" is not known; known are {}", codes().join(", ")));
        }
        if let Err(e) = self.clips() {
            s.problem("clips", e);
        }
        for (key, bounds) in [("length_correct", &self.length_correct), ("length_wrong", &self.length_wrong)] {
            if bounds.len() != 2 {
                s.problem(key, format!("has {} numbers; it takes two", bounds.len()));
            }
        }
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
            None if self.uses("matches") => s.problem("rules", "has `matches`, which needs `reward.pattern`"),
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

/// The weighted sum of rules.
pub struct Rules {
    rules: Vec<Part>,
}

struct Part {
    name: String,
    weight: f64,
    /// Bounds of the score, before it is weighted.
    clip: Option<(f64, f64)>,
    rule: Rule,
}

impl Rules {
    /// The rules that settings name.
    pub fn new(config: &RuleSource) -> std::result::Result<Self, String> {
        let clips = config.clips()?;
        let part = |(i, name): (usize, &String)| {
            let weight = config.weights.get(i).copied().unwrap_or(1.0);
            let clip = clips.iter().find(|(of, _)| of == name).map(|(_, bounds)| *bounds);
            Ok(Part { name: name.clone(), weight, clip, rule: Rule::new(name, config)? })
        };
        Ok(Self { rules: config.rules.iter().enumerate().map(part).collect::<std::result::Result<_, String>>()? })
    }

    fn score_one(&self, sample: &Sample) -> std::result::Result<Judged, RewardError> {
        let mut total = 0.0;
        let mut reasons = Vec::with_capacity(self.rules.len());
        for Part { name, weight, clip, rule } in &self.rules {
            let failed = |reason| RewardError::Failed { name: name.clone(), row: sample.row, reason };
            let Some(score) = rule.score(sample).map_err(failed)? else {
                return Ok(Judged::skipped(format!("{name}: the row's answer cannot be read")));
            };
            let score = clip.map_or(score, |(min, max)| score.clamp(min, max));
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

    #[test]
    fn rules_are_clipped_weighted_and_give_reasons() {
        let config = RuleSource {
            rules: vec!["matches".into(), "distinct_words".into()],
            weights: vec![2.0, 0.5],
            clips: vec!["distinct_words = 0..2".into()],
            pattern: Some("(?i)please".into()),
            ..RuleSource::default()
        };
        let rules = Rules::new(&config).unwrap();
        let (prompt, completion) = (String::new(), "Please do do it".to_string());
        let judged = rules.score_one(&Sample { prompt, completion, ..Sample::default() }).unwrap();
        assert_eq!(judged.score, 3.0);
        assert_eq!(judged.reason, "matches 1.000, distinct_words 2.000");
    }

    #[test]
    fn clips_name_a_rule_and_two_bounds() {
        let clips = |text: &str| RuleSource { clips: vec![text.into()], ..RuleSource::default() }.clips();
        assert_eq!(clips("repetition=-0.5..0").unwrap(), [("repetition".to_string(), (-0.5, 0.0))]);
        for wrong in ["repetition", "repetition=1", "repetition=2..1", "other=0..1", "repetition=a..b"] {
            assert!(clips(wrong).is_err(), "{wrong}");
        }
    }
}
