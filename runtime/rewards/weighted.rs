//! The reward of a job: its sources, added up by weight.

use std::sync::Arc;

use rehearsal_actors::{Judged, Placement, Reward, RewardError, Sample};

/// Weighted sum of rewards. Scores are `Σ weight x score`; reasons and exchanges are joined.
pub struct WeightedReward {
    /// Names of the parts, joined by ` + `.
    name: String,
    parts: Vec<(f64, Arc<dyn Reward>)>,
}

impl WeightedReward {
    /// Scorers with their weights, in the order in which their scores are added.
    pub fn new(parts: Vec<(f64, Arc<dyn Reward>)>) -> Self {
        let names: Vec<&str> = parts.iter().map(|(_, part)| part.name()).collect();
        Self { name: names.join(" + "), parts }
    }
}

impl Reward for WeightedReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_relative(&self) -> bool {
        self.parts.iter().any(|(_, part)| part.is_relative())
    }

    fn placements(&self) -> Vec<Placement> {
        self.parts.iter().flat_map(|(_, part)| part.placements()).collect()
    }

    fn timeout(&self) -> Option<std::time::Duration> {
        self.parts.iter().filter_map(|(_, part)| part.timeout()).max()
    }

    fn batch(&self) -> Option<usize> {
        // One that compares needs all completions of a prompt in one call.
        if self.is_relative() {
            return None;
        }
        self.parts.iter().filter_map(|(_, part)| part.batch()).min()
    }

    fn may_be_abandoned(&self) -> bool {
        self.parts.iter().all(|(_, part)| part.may_be_abandoned())
    }

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        if let [(1.0, only)] = self.parts.as_slice() {
            return only.score(samples);
        }
        let mut whole = vec![Judged::default(); samples.len()];
        for (weight, part) in &self.parts {
            let judged = part.score(samples)?;
            if judged.len() != samples.len() {
                let (name, found, wanted) = (part.name().to_string(), judged.len(), samples.len());
                return Err(RewardError::Count { name, found, wanted });
            }
            for (whole, judged) in whole.iter_mut().zip(judged) {
                whole.score += weight * judged.score;
                let apart = if whole.reason.is_empty() { "" } else { " | " };
                let reason = format!("{apart}{weight} x {:.4} by {} {}", judged.score, part.name(), judged.reason);
                whole.reason.push_str(reason.trim_end());
                whole.exchanges.extend(judged.exchanges);
                whole.skipped |= judged.skipped;
            }
        }
        Ok(whole)
    }
}
