//! People as the reward of a job: it waits for them, and what they said before it was cut off is not asked again.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use rehearsal_store::{KeptReply, Prompt, Usage};
use tokio_util::sync::CancellationToken;

use super::board::{Item, Label, Word};
use super::book::{Book, person, preference};
use super::desk::Desk;
use crate::judge::{NO_TIMEOUT, ReplyCache, same_prompt};

/// How often a waiting job looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(200);

/// Whoever looks at the page.
pub struct PeopleReward {
    desk: Arc<Desk>,
    memory: Arc<dyn ReplyCache>,
    stop: CancellationToken,
}

impl PeopleReward {
    /// Items go up on the desk; what is said of them comes back through memory after a resume.
    pub fn new(desk: Arc<Desk>, memory: Arc<dyn ReplyCache>, stop: CancellationToken) -> Self {
        Self { desk, memory, stop }
    }

    fn failed(&self, reason: String) -> RewardError {
        RewardError::Failed { name: self.name().into(), row: 0, reason }
    }

    fn known(&self, items: &[Item]) -> Result<Vec<Vec<Label>>, RewardError> {
        let kept = self.memory.recall(&items.iter().map(key).collect::<Vec<_>>())?;
        let read = |kept: Option<KeptReply>| match kept {
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

    fn compares(&self) -> bool {
        true
    }

    fn patience(&self) -> Option<Duration> {
        Some(NO_TIMEOUT)
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let groups: Vec<&[Sample]> = samples.chunk_by(same_prompt).collect();
        let worth_asking = |group: &&&[Sample]| group.iter().any(|s| s.completion != group[0].completion);
        let items: Vec<Item> = groups.iter().filter(worth_asking).map(|group| item(group)).collect();
        let known = self.known(&items)?;
        let ids = self.desk.add(items.iter().cloned().zip(known).collect()).map_err(|e| self.failed(e))?;
        while !self.desk.wait(&ids, LOOK) {
            if self.stop.is_cancelled() {
                self.desk.take(&ids);
                return Err(RewardError::Stopped { name: self.name().into() });
            }
        }
        let mut said = items.iter().zip(self.desk.take(&ids));
        let mut judged = Vec::with_capacity(samples.len());
        for group in &groups {
            match worth_asking(&group).then(|| said.next()).flatten() {
                Some((item, labels)) => judged.extend(scores(item, &labels)),
                None => judged.extend(group.iter().map(|_| Judged::new(0.5, "all answers are the same"))),
            }
        }
        Ok(judged)
    }
}

fn item(group: &[Sample]) -> Item {
    let prompt = Prompt::Text(group.first().map_or_else(String::new, |s| s.prompt.clone()));
    Item { prompt, completions: group.iter().map(|s| s.completion.clone()).collect() }
}

/// Each completion's score: the share of the others that it beats, a tie being half a win, over all labellers.
fn scores(item: &Item, labels: &[Label]) -> Vec<Judged> {
    let n = item.completions.len();
    let rankings: Vec<(&Label, &Vec<u32>)> = labels
        .iter()
        .filter_map(|label| match &label.word {
            Word::Ranks(ranks) => Some((label, ranks)),
            _ => None,
        })
        .collect();
    let beats = |ranks: &[u32], i: usize| {
        let others = (0..n).filter(|&j| j != i);
        let won = others.map(|j| f64::from(ranks[i] < ranks[j]) + 0.5 * f64::from(ranks[i] == ranks[j]));
        won.sum::<f64>() / (n - 1).max(1) as f64
    };
    let voices = rankings.len().max(1) as f64;
    let mut judged: Vec<Judged> = (0..n)
        .map(|i| {
            let places: Vec<String> =
                rankings.iter().map(|(l, ranks)| format!("{} by {}", ranks[i], person(&l.labeller))).collect();
            let score = rankings.iter().map(|(_, ranks)| beats(ranks, i)).sum::<f64>() / voices;
            Judged::new(score, format!("rank {}", places.join(", ")))
        })
        .collect();
    if let Some(first) = judged.first_mut() {
        first.exchanges = labels.iter().flat_map(|label| preference(item, label).exchanges).collect();
    }
    judged
}

/// Labels of a job under way, in its store.
pub struct MemoryBook(pub Arc<dyn ReplyCache>);

impl Book for MemoryBook {
    fn keep(&mut self, item: &Item, labels: &[Label]) -> Result<(), String> {
        let reply = serde_json::to_string(labels).map_err(|e| e.to_string())?;
        let kept = KeptReply { reply, usage: Usage::default() };
        self.0.remember(vec![(key(item), kept)], Usage::default()).map_err(|e| e.to_string())
    }
}

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
    fn several_people_make_one_score() {
        let item = Item { prompt: Prompt::Text("q".into()), completions: ["a", "b", "c"].map(String::from).to_vec() };
        let label = |who: &str, word| Label { labeller: who.into(), word, shown: vec![0, 1, 2], time_ms: 0 };
        let labels = [
            label("anna", Word::Ranks(vec![1, 2, 3])),
            label("ben", Word::Ranks(vec![1, 1, 2])),
            label("carl", Word::Skipped),
        ];
        let judged = scores(&item, &labels);
        assert_eq!(judged.iter().map(|j| j.score).collect::<Vec<_>>(), [0.875, 0.625, 0.0]);
        assert_eq!(judged[1].reason, "rank 2 by person:anna, 1 by person:ben");
        assert_eq!(judged[0].exchanges.len(), 3);
    }
}
