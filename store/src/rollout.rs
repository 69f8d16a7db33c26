//! The log of a step's rollouts and scores, from which an interrupted step resumes without sampling or scoring again.

use serde::{Deserialize, Serialize};

use crate::kv::{Entry, WriteBatch};
use crate::{Exchange, Result, Store, key, record};

/// A sampled completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutRecord {
    /// Step of the job.
    pub step: u64,
    /// Index in the step: prompt by prompt, and completion by completion in each.
    pub index: u32,
    /// Identifies the completion's stream of random numbers.
    pub id: u64,
    /// Version of the policy that sampled it: its number of updates.
    pub policy_version: u64,
    /// Token ids, with the end-of-sequence token if one was sampled.
    pub tokens: Vec<u32>,
    /// Log-probability of each token when it was sampled.
    pub logprobs: Vec<f32>,
    /// Why it ended: 0 for an end-of-sequence token, 1 for a stop string, 2 for the length limit.
    pub finish: u8,
}

/// The score of a rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoreRecord {
    /// Step of the job.
    pub step: u64,
    /// Index of the rollout in the step.
    pub index: u32,
    /// Score; higher is better.
    pub score: f64,
    /// Explanation given by the scorer; may be empty.
    pub reason: String,
    /// The requests to judges that led to the score, and their replies.
    pub exchanges: Vec<Exchange>,
    /// Whether the rollout has no score and is left out; `reason` says why.
    pub skipped: bool,
}

impl record::Record for RolloutRecord {}

impl record::Record for ScoreRecord {
    fn decode(version: u8, bytes: &[u8]) -> postcard::Result<Self> {
        match version {
            0 | 1 => {
                let (step, index, score, reason) = postcard::from_bytes(bytes)?;
                Ok(Self { step, index, score, reason, exchanges: Vec::new(), skipped: false })
            }
            2 => {
                let (step, index, score, reason, exchanges) = postcard::from_bytes(bytes)?;
                Ok(Self { step, index, score, reason, exchanges, skipped: false })
            }
            _ => postcard::from_bytes(bytes),
        }
    }
}

impl Store {
    /// Logs sampled completions. One with the same step and index is replaced.
    pub fn log_rollouts(&mut self, rollouts: &[RolloutRecord]) -> Result<()> {
        let mut batch = WriteBatch::default();
        for r in rollouts {
            record::put(&mut batch, key::item(key::ROLLOUT, r.step, r.index), record::ROLLOUT, r)?;
        }
        self.kv.apply(batch)
    }

    /// Logs scores. One with the same step and index is replaced.
    pub fn log_scores(&mut self, scores: &[ScoreRecord]) -> Result<()> {
        let mut batch = WriteBatch::default();
        for s in scores {
            record::put(&mut batch, key::item(key::SCORE, s.step, s.index), record::SCORE, s)?;
        }
        self.kv.apply(batch)
    }

    /// The logged completions of a step, in the order of their indices.
    pub fn rollouts(&self, step: u64) -> Result<Vec<RolloutRecord>> {
        self.of_step(key::ROLLOUT, step, record::ROLLOUT)
    }

    /// The logged scores of a step, in the order of their indices.
    pub fn scores(&self, step: u64) -> Result<Vec<ScoreRecord>> {
        self.of_step(key::SCORE, step, record::SCORE)
    }

    /// Adds to `batch` the deletion of the rollouts and scores of the steps before `step`.
    pub(crate) fn retire_rollouts(&self, batch: &mut WriteBatch, step: u64) -> Result<()> {
        for kind in [key::ROLLOUT, key::SCORE] {
            let entries = self.kv.scan(kind)?;
            let is_old = |entry: &Result<Entry>| entry.as_ref().map_or(true, |(k, _)| key::step_of(k) < Some(step));
            for entry in entries.take_while(is_old) {
                let (key, _) = entry?;
                record::remove(&*self.kv, batch, key)?;
            }
        }
        Ok(())
    }

    pub(crate) fn of_step<T: record::Record>(&self, kind: &[u8], step: u64, record: record::Kind) -> Result<Vec<T>> {
        self.kv
            .scan(&key::step(kind, step))?
            .map(|entry| entry.and_then(|(key, value)| record::decode(&*self.kv, &key, &value, record)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rollout(step: u64, index: u32, tokens: usize) -> RolloutRecord {
        let tokens: Vec<u32> = (0..tokens as u32).collect();
        let logprobs = tokens.iter().map(|&t| -(t as f32)).collect();
        RolloutRecord { step, index, id: 9, policy_version: step, tokens, logprobs, finish: 0 }
    }

    #[test]
    fn rollouts_are_read_by_step_and_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::with_kv(Box::new(crate::MemoryKv::default()), directory.path()).unwrap();
        for step in 0..3 {
            // The second is long enough to be split.
            store.log_rollouts(&[rollout(step, 0, 5), rollout(step, 1, 4000)]).unwrap();
            store
                .log_scores(&[ScoreRecord {
                    step,
                    index: 0,
                    score: 0.1,
                    reason: "short".into(),
                    exchanges: Vec::new(),
                    skipped: false,
                }])
                .unwrap();
        }
        assert_eq!(store.rollouts(1).unwrap(), [rollout(1, 0, 5), rollout(1, 1, 4000)]);
        // Two checkpoints are kept, so the older one can still be resumed as it was.
        for step in 1..=3 {
            store.save_checkpoint(step, &Default::default(), &[], b"", 2).unwrap();
        }
        assert!(store.rollouts(1).unwrap().is_empty() && store.scores(1).unwrap().is_empty());
        assert_eq!(store.rollouts(2).unwrap().len(), 2);
        assert_eq!(store.scores(2).unwrap()[0].score, 0.1);
    }
}
