//! Rollouts as they finish, and what was said of them, so that nothing is generated or judged twice.

use serde::{Deserialize, Serialize};

use crate::kv::Changes;
use crate::{Exchange, Result, Store, key, record};

/// A finished completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    pub step: u64,
    /// Place in the step: prompt by prompt, completion by completion.
    pub index: u32,
    /// Address of its random numbers.
    pub id: u64,
    /// Version of the policy that said it: the number of its updates.
    pub policy_version: u64,
    pub tokens: Vec<u32>,
    /// Log-probability of each token when it was drawn.
    pub logprobs: Vec<f32>,
    /// 0: end of sequence, 1: stop text, 2: length.
    pub finish: u8,
}

/// What the reward said of a rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub step: u64,
    pub index: u32,
    pub score: f64,
    /// Why, in the scorer's words.
    pub reason: String,
    /// What was asked about it, and what the scorer said.
    pub exchanges: Vec<Exchange>,
}

impl record::Record for Rollout {}

impl record::Record for Verdict {
    fn decode(version: u8, bytes: &[u8]) -> postcard::Result<Self> {
        if version > 1 {
            return postcard::from_bytes(bytes);
        }
        let (step, index, score, reason) = postcard::from_bytes(bytes)?;
        Ok(Self { step, index, score, reason, exchanges: Vec::new() })
    }
}

impl Store {
    /// Logs finished completions.
    pub fn log_rollouts(&mut self, rollouts: &[Rollout]) -> Result<()> {
        let mut changes = Changes::default();
        for r in rollouts {
            record::put(&mut changes, key::item(key::ROLLOUT, r.step, r.index), record::ROLLOUT, r)?;
        }
        self.kv.apply(changes)
    }

    /// Logs verdicts.
    pub fn log_verdicts(&mut self, verdicts: &[Verdict]) -> Result<()> {
        let mut changes = Changes::default();
        for v in verdicts {
            record::put(&mut changes, key::item(key::VERDICT, v.step, v.index), record::VERDICT, v)?;
        }
        self.kv.apply(changes)
    }

    /// The logged completions of a step, in order.
    pub fn rollouts(&self, step: u64) -> Result<Vec<Rollout>> {
        self.of_step(key::ROLLOUT, step, record::ROLLOUT)
    }

    /// The logged verdicts of a step, in order.
    pub fn verdicts(&self, step: u64) -> Result<Vec<Verdict>> {
        self.of_step(key::VERDICT, step, record::VERDICT)
    }

    /// Forgets rollouts and verdicts of the steps before `step`: a checkpoint has their effect.
    pub fn forget_rollouts_before(&mut self, step: u64) -> Result<()> {
        let mut changes = Changes::default();
        for kind in [key::ROLLOUT, key::VERDICT] {
            let old: Vec<_> = self
                .kv
                .scan(kind)?
                .take_while(|entry| entry.as_ref().map_or(true, |(k, _)| key::step_of(k) < Some(step)))
                .collect::<Result<_>>()?;
            for (key, _) in old {
                record::remove(&*self.kv, &mut changes, key)?;
            }
        }
        if changes.0.is_empty() { Ok(()) } else { self.kv.apply(changes) }
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

    fn rollout(step: u64, index: u32, tokens: usize) -> Rollout {
        let tokens: Vec<u32> = (0..tokens as u32).collect();
        let logprobs = tokens.iter().map(|&t| -(t as f32)).collect();
        Rollout { step, index, id: 9, policy_version: step, tokens, logprobs, finish: 0 }
    }

    #[test]
    fn rollouts_come_back_by_step_and_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::with_kv(Box::new(crate::MemoryKv::default()), directory.path()).unwrap();
        for step in 0..3 {
            // The second is long enough to be split.
            store.log_rollouts(&[rollout(step, 0, 5), rollout(step, 1, 4000)]).unwrap();
            store
                .log_verdicts(&[Verdict { step, index: 0, score: 0.1, reason: "short".into(), exchanges: Vec::new() }])
                .unwrap();
        }
        assert_eq!(store.rollouts(1).unwrap(), [rollout(1, 0, 5), rollout(1, 1, 4000)]);
        store.forget_rollouts_before(2).unwrap();
        assert!(store.rollouts(1).unwrap().is_empty() && store.verdicts(1).unwrap().is_empty());
        assert_eq!(store.rollouts(2).unwrap().len(), 2);
        assert_eq!(store.verdicts(2).unwrap()[0].score, 0.1);
    }
}
