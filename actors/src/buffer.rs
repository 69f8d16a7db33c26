//! The buffer: scored rollouts that no update has used yet, bounded in number and staleness.

use std::collections::BTreeMap;
use std::sync::Arc;

use rehearsal_lm::generate::Completion;

use crate::role::{Build, Link, Permit, Reply, StateMachine, answer, local_message, role_status};
use crate::{Error, Judged, Result};

/// A completion with its scores and log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredCompletion {
    /// Index among the completions of its prompt.
    pub index: usize,
    /// Version of the policy that sampled it: its number of updates.
    pub policy_version: u64,
    /// The completion as it was sampled.
    pub completion: Completion,
    /// Its text, without stop string and end-of-sequence token.
    pub text: String,
    /// Its score.
    pub judged: Judged,
    /// Log-probability of each completion token under the reference; empty where no reference is used.
    pub ref_logprobs: Vec<f32>,
}

/// The completions of one prompt, in the order of their indices.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Index of the prompt in its step.
    pub prompt: u32,
    /// Completions of the prompt, in the order of sampling.
    pub completions: Vec<ScoredCompletion>,
}

pub(crate) enum BufferMsg {
    Insert { prompt: u32, completion: Box<ScoredCompletion>, _permit: Permit, reply: Reply<()> },
    Take { policy_version: u64, _permit: Permit, reply: Reply<(Vec<Group>, usize)> },
    Clear { _permit: Permit, reply: Reply<()> },
}
local_message!(BufferMsg);

pub(crate) struct Buffer {
    groups: BTreeMap<u32, Vec<ScoredCompletion>>,
    group_size: usize,
    rollouts_max: usize,
    staleness_max: u64,
}

impl Buffer {
    fn insert(&mut self, prompt: u32, completion: ScoredCompletion) -> Result<()> {
        let held = self.groups.values().map(Vec::len).sum();
        if held >= self.rollouts_max {
            return Err(Error::BufferFull { held, max: self.rollouts_max });
        }
        self.groups.entry(prompt).or_default().push(completion);
        Ok(())
    }

    /// Removes the complete groups. Returns those that are not stale, and the number of completions in stale ones.
    fn take(&mut self, policy_version: u64) -> (Vec<Group>, usize) {
        let complete: Vec<u32> =
            self.groups.iter().filter(|(_, g)| g.len() >= self.group_size).map(|(p, _)| *p).collect();
        let mut groups = Vec::new();
        let mut stale = 0;
        for prompt in complete {
            let Some(mut completions) = self.groups.remove(&prompt) else { continue };
            let age = |c: &ScoredCompletion| policy_version.saturating_sub(c.policy_version);
            if completions.iter().any(|c| age(c) > self.staleness_max) {
                stale += completions.len();
                continue;
            }
            completions.sort_by_key(|c| c.index);
            groups.push(Group { prompt, completions });
        }
        (groups, stale)
    }
}

impl StateMachine for Buffer {
    type Message = BufferMsg;

    fn apply(&mut self, message: BufferMsg) {
        match message {
            BufferMsg::Insert { prompt, completion, reply, .. } => answer(reply, self.insert(prompt, *completion)),
            BufferMsg::Take { policy_version, reply, .. } => answer(reply, Ok(self.take(policy_version))),
            BufferMsg::Clear { reply, .. } => {
                self.groups.clear();
                answer(reply, Ok(()));
            }
        }
    }
}

/// Handle to the buffer.
#[derive(Clone)]
pub struct BufferHandle {
    pub(crate) link: Link<BufferMsg>,
}

impl BufferHandle {
    pub(crate) fn build(group_size: usize, rollouts_max: usize, staleness_max: u64) -> Build<Buffer> {
        Arc::new(move || Ok(Buffer { groups: BTreeMap::new(), group_size, rollouts_max, staleness_max }))
    }

    /// Inserts a scored completion of the prompt at index `prompt` of the step.
    ///
    /// # Errors
    ///
    /// [`Error::BufferFull`] if the buffer holds as many completions as it may.
    pub async fn insert(&self, prompt: u32, completion: ScoredCompletion) -> Result<()> {
        self.link
            .ask("insert", |_permit, reply| BufferMsg::Insert {
                prompt,
                completion: Box::new(completion),
                _permit,
                reply,
            })
            .await
    }

    /// Removes the complete groups in the order of prompts. Returns them, and the number of completions that were dropped
    /// because their policy was too many updates older than `policy_version`.
    pub async fn take(&self, policy_version: u64) -> Result<(Vec<Group>, usize)> {
        self.link.ask("take", |_permit, reply| BufferMsg::Take { policy_version, _permit, reply }).await
    }

    /// Removes everything, for a restart from a checkpoint.
    pub async fn clear(&self) -> Result<()> {
        self.link.ask("clear", |_permit, reply| BufferMsg::Clear { _permit, reply }).await
    }
}
role_status!(BufferHandle);

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_lm::generate::Finish;

    fn completion(index: usize, policy_version: u64) -> ScoredCompletion {
        let completion = Completion { id: index as u64, tokens: vec![1], logprobs: vec![0.0], finish: Finish::Eos };
        ScoredCompletion {
            index,
            policy_version,
            completion,
            text: String::new(),
            judged: 0.0.into(),
            ref_logprobs: vec![0.0],
        }
    }

    fn buffer() -> Buffer {
        Buffer { groups: BTreeMap::new(), group_size: 2, rollouts_max: 4, staleness_max: 1 }
    }

    #[test]
    fn only_complete_groups_are_taken_in_order() {
        let mut buffer = buffer();
        buffer.insert(5, completion(1, 3)).unwrap();
        buffer.insert(2, completion(0, 3)).unwrap();
        buffer.insert(5, completion(0, 3)).unwrap();
        let (groups, stale) = buffer.take(3);
        assert_eq!((groups.len(), groups[0].prompt, stale), (1, 5, 0));
        assert_eq!(groups[0].completions.iter().map(|c| c.index).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(buffer.take(3).0, []);
    }

    #[test]
    fn old_and_surplus_rollouts_are_refused() {
        let mut buffer = buffer();
        for (prompt, index) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            buffer.insert(prompt, completion(index, prompt as u64)).unwrap();
        }
        let error = buffer.insert(2, completion(0, 0)).unwrap_err().to_string();
        assert!(error.contains("holds 4"), "{error}");
        let (groups, stale) = buffer.take(2);
        assert_eq!((groups.len(), groups[0].prompt, stale), (1, 1, 2));
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Operation {
        Insert { prompt: u32, index: usize, policy_version: u64 },
        Take { policy_version: u64 },
        Clear,
    }

    fn operation() -> impl Strategy<Value = Operation> {
        prop_oneof![
            12 => (0u32..5, 0usize..4, 0u64..4)
                .prop_map(|(prompt, index, policy_version)| Operation::Insert { prompt, index, policy_version }),
            3 => (0u64..5).prop_map(|policy_version| Operation::Take { policy_version }),
            1 => Just(Operation::Clear),
        ]
    }

    fn completion(index: usize, policy_version: u64) -> ScoredCompletion {
        let finish = rehearsal_lm::generate::Finish::Length;
        let completion = Completion { id: index as u64, tokens: vec![index as u32], logprobs: vec![0.0], finish };
        let (text, judged) = (String::new(), Judged::new(0.0, ""));
        ScoredCompletion { index, policy_version, completion, text, judged, ref_logprobs: Vec::new() }
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_once_whole_fresh_and_in_order(
            operations in proptest::collection::vec(operation(), 0..60),
            (group_size, rollouts_max, staleness_max) in (1usize..4, 1usize..12, 0u64..3),
        ) {
            let mut buffer = Buffer { groups: BTreeMap::new(), group_size, rollouts_max, staleness_max };
            let mut model: Vec<(u32, ScoredCompletion)> = Vec::new();
            for operation in operations {
                match operation {
                    Operation::Insert { prompt, index, policy_version } => {
                        let completion = completion(index, policy_version);
                        let inserted = buffer.insert(prompt, completion.clone());
                        prop_assert_eq!(inserted.is_ok(), model.len() < rollouts_max);
                        if inserted.is_ok() {
                            model.push((prompt, completion));
                        }
                    }
                    Operation::Take { policy_version } => {
                        let (groups, stale) = buffer.take(policy_version);
                        let (mut wanted, mut wanted_stale) = (Vec::new(), 0);
                        for prompt in 0..5 {
                            let of = |(p, _): &(u32, ScoredCompletion)| *p == prompt;
                            let mut group: Vec<_> = model.iter().filter(|e| of(e)).map(|(_, c)| c.clone()).collect();
                            if group.len() < group_size {
                                continue;
                            }
                            model.retain(|e| !of(e));
                            if group.iter().any(|c| c.policy_version + staleness_max < policy_version) {
                                wanted_stale += group.len();
                                continue;
                            }
                            group.sort_by_key(|c| c.index);
                            wanted.push(Group { prompt, completions: group });
                        }
                        prop_assert_eq!((groups, stale), (wanted, wanted_stale));
                    }
                    Operation::Clear => {
                        buffer.groups.clear();
                        model.clear();
                    }
                }
            }
        }
    }
}
