//! All sources of rewards: one line for each.

use super::encoder::EncoderSource;
use super::judge::JudgeSource;
use super::models::RewardModelSource;
use super::people::PeopleSource;
use super::rules::RuleSource;
use super::scorer::ScorerSource;
use super::source::RewardSource;

/// Every source with its default settings, in the order in which their scores are added.
pub fn sources() -> Vec<Box<dyn RewardSource>> {
    vec![
        Box::new(RuleSource::default()),
        Box::new(RewardModelSource::default()),
        Box::new(JudgeSource::default()),
        Box::new(ScorerSource::default()),
        Box::new(EncoderSource::default()),
        Box::new(PeopleSource::default()),
    ]
}
