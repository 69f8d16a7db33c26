//! `[people]`: people as the reward of a job. The job waits for their labels; labels saved before an interruption are
//! not asked for again.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use rehearsal_store::{CachedReply, Prompt, Usage};
use tokio_util::sync::CancellationToken;

use super::queue::{Item, ItemId, Label, LabelValue};
use super::service::LabelService;
use super::store::{LabelStore, preference};
use crate::data::ledger::judge_name;
use crate::judge::{LONGEST_WAIT, ReplyCache, same_prompt};
use crate::metrics::Meters;
use crate::metrics::table::sources;

/// Interval at which a waiting job checks whether it is cancelled.
const CANCEL_POLL: Duration = Duration::from_millis(200);

/// Scores completions by the rankings of people at the label page.
pub struct PeopleReward {
    service: Arc<LabelService>,
    cache: Arc<dyn ReplyCache>,
    stop: CancellationToken,
    meters: Arc<Meters>,
}

impl PeopleReward {
    /// Adds items to the queue of `service` and reads the labels of a resumed job from `cache`. Cancelling `stop` ends
    /// the wait.
    pub(crate) fn new(
        service: Arc<LabelService>,
        cache: Arc<dyn ReplyCache>,
        stop: CancellationToken,
        meters: Arc<Meters>,
    ) -> Self {
        Self { service, cache, stop, meters }
    }

    fn failed(&self, reason: String) -> RewardError {
        RewardError::Failed { name: self.name().into(), row: 0, reason }
    }

    /// Saved labels of each item.
    fn saved(&self, items: &[Item]) -> Result<Vec<Vec<Label>>, RewardError> {
        let kept = self.cache.recall(&items.iter().map(key).collect::<Vec<_>>())?;
        let read = |kept: Option<CachedReply>| match kept {
            Some(kept) => serde_json::from_str(&kept.reply).map_err(|e| self.failed(e.to_string())),
            None => Ok(Vec::new()),
        };
        kept.into_iter().map(read).collect()
    }
}

impl Reward for PeopleReward {
    fn name(&self) -> &str {
        "people"
    }

    fn is_relative(&self) -> bool {
        true
    }

    fn timeout(&self) -> Option<Duration> {
        Some(LONGEST_WAIT)
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let groups: Vec<&[Sample]> = samples.chunk_by(same_prompt).collect();
        // Equal completions need no judgement.
        let differs = |group: &&&[Sample]| group.iter().any(|s| s.completion != group[0].completion);
        // Equal items are one question, with one answer: labels are saved by content.
        let mut items: Vec<Item> = Vec::new();
        for item in groups.iter().filter(differs).map(|group| item(group)) {
            if !items.contains(&item) {
                items.push(item);
            }
        }
        let saved = self.saved(&items)?;
        let known = saved.iter().flatten().filter(|label| label.value != LabelValue::Skipped).count();
        let ids = self.service.add(items.iter().cloned().zip(saved).collect()).map_err(|e| self.failed(e))?;
        let mut timeout = Duration::ZERO;
        loop {
            let open = self.service.wait(&ids, timeout);
            self.meters.set(sources::PEOPLE_WAITING, open as f64);
            if open == 0 {
                break;
            }
            timeout = CANCEL_POLL;
            if self.stop.is_cancelled() {
                self.service.remove(&ids);
                return Err(RewardError::Stopped { name: self.name().into() });
            }
        }
        let labels = self.service.remove(&ids);
        let given = labels.iter().flatten().filter(|label| label.value != LabelValue::Skipped).count();
        self.meters.count(sources::PEOPLE_LABELS, "", given.saturating_sub(known) as u64);
        let mut judged = Vec::with_capacity(samples.len());
        for group in &groups {
            let of_group = item(group);
            match differs(&group).then(|| items.iter().zip(&labels).find(|(item, _)| **item == of_group)).flatten() {
                Some((item, labels)) => judged.extend(scores(item, labels)),
                None => judged.extend(group.iter().map(|_| Judged::new(0.5, "all answers are the same"))),
            }
        }
        Ok(judged)
    }
}

/// The completions of one prompt as an item.
fn item(group: &[Sample]) -> Item {
    let prompt = Prompt::Text(group.first().map_or_else(String::new, |s| s.prompt.clone()));
    Item { prompt, completions: group.iter().map(|s| s.completion.clone()).collect() }
}

/// Score of each completion: the share of the others that it beats, averaged over labellers; a tie counts half.
fn scores(item: &Item, labels: &[Label]) -> Vec<Judged> {
    let n = item.completions.len();
    let rankings: Vec<(&Label, &Vec<u32>)> = labels
        .iter()
        .filter_map(|label| match &label.value {
            LabelValue::Ranks(ranks) => Some((label, ranks)),
            _ => None,
        })
        .collect();
    let beats = |ranks: &[u32], i: usize| {
        let others = (0..n).filter(|&j| j != i);
        let won = others.map(|j| f64::from(ranks[i] < ranks[j]) + 0.5 * f64::from(ranks[i] == ranks[j]));
        won.sum::<f64>() / (n - 1).max(1) as f64
    };
    let labellers = rankings.len().max(1) as f64;
    let mut judged: Vec<Judged> = (0..n)
        .map(|i| {
            let ranks: Vec<String> =
                rankings.iter().map(|(l, ranks)| format!("{} by {}", ranks[i], judge_name(&l.labeller))).collect();
            let score = rankings.iter().map(|(_, ranks)| beats(ranks, i)).sum::<f64>() / labellers;
            Judged::new(score, format!("rank {}", ranks.join(", ")))
        })
        .collect();
    if let Some(first) = judged.first_mut() {
        first.exchanges = labels.iter().flat_map(|label| preference(item, label).exchanges).collect();
    }
    judged
}

/// Labels of a running job, saved in the reply cache of its store as JSON by a hash of the item.
pub struct CachedLabels(pub Arc<dyn ReplyCache>);

impl LabelStore for CachedLabels {
    fn save(&mut self, _: ItemId, item: &Item, labels: &[Label]) -> Result<(), String> {
        let reply = serde_json::to_string(labels).map_err(|e| e.to_string())?;
        let kept = CachedReply { reply, usage: Usage::default() };
        self.0.remember(vec![(key(item), kept)], Usage::default()).map_err(|e| e.to_string())
    }
}

/// Cache key of an item: a hash of prompt and completions.
fn key(item: &Item) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"people\0");
    let Prompt::Text(prompt) = &item.prompt else { return String::new() };
    for text in std::iter::once(prompt).chain(&item.completions) {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_several_people_are_averaged() {
        let item = Item { prompt: Prompt::Text("q".into()), completions: ["a", "b", "c"].map(String::from).to_vec() };
        let label = |who: &str, value| Label { labeller: who.into(), value, shown: vec![0, 1, 2], time_ms: 0 };
        let labels = [
            label("anna", LabelValue::Ranks(vec![1, 2, 3])),
            label("ben", LabelValue::Ranks(vec![1, 1, 2])),
            label("carl", LabelValue::Skipped),
        ];
        let judged = scores(&item, &labels);
        assert_eq!(judged.iter().map(|j| j.score).collect::<Vec<_>>(), [0.875, 0.625, 0.0]);
        assert_eq!(judged[1].reason, "rank 2 by person:anna, 1 by person:ben");
        assert_eq!(judged[0].exchanges.len(), 3);
    }
}
