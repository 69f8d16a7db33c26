//! The buffer: rollouts that are scored and not yet learned from, bounded in number and age.

use std::collections::BTreeMap;
use std::sync::Arc;

use rehearsal_lm::generate::Completion;

use crate::role::{Build, Link, Machine, Reply, Ticket, answer, local_message, role_status};
use crate::{Error, Judged, Result};

/// A completion with all that was said of it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredCompletion {
    /// Place among the completions of its prompt.
    pub place: usize,
    /// Updates the policy had seen when it spoke.
    pub policy_version: u64,
    pub completion: Completion,
    pub text: String,
    pub judged: Judged,
    /// Log-probabilities under the reference, token by token.
    pub ref_logprobs: Vec<f32>,
}

/// The completions of one prompt, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Place of the prompt in its step.
    pub prompt: u32,
    pub completions: Vec<ScoredCompletion>,
}

pub(crate) enum BufferMsg {
    Insert { prompt: u32, completion: Box<ScoredCompletion>, _ticket: Ticket, reply: Reply<()> },
    Take { policy_version: u64, _ticket: Ticket, reply: Reply<(Vec<Group>, usize)> },
    Clear { _ticket: Ticket, reply: Reply<()> },
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

    /// Complete groups that are young enough, and how many completions were dropped for their age.
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
            completions.sort_by_key(|c| c.place);
            groups.push(Group { prompt, completions });
        }
        (groups, stale)
    }
}

impl Machine for Buffer {
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

/// Speaks to the buffer.
#[derive(Clone)]
pub struct BufferHandle {
    pub(crate) link: Link<BufferMsg>,
}

impl BufferHandle {
    pub(crate) fn build(group_size: usize, rollouts_max: usize, staleness_max: u64) -> Build<Buffer> {
        Arc::new(move || Ok(Buffer { groups: BTreeMap::new(), group_size, rollouts_max, staleness_max }))
    }

    /// Puts a scored completion with the others of its prompt.
    pub async fn insert(&self, prompt: u32, completion: ScoredCompletion) -> Result<()> {
        self.link
            .ask(|_ticket, reply| BufferMsg::Insert { prompt, completion: Box::new(completion), _ticket, reply })
            .await
    }

    /// Takes the complete groups, in the order of prompts; and says how many completions were too old.
    pub async fn take(&self, policy_version: u64) -> Result<(Vec<Group>, usize)> {
        self.link.ask(|_ticket, reply| BufferMsg::Take { policy_version, _ticket, reply }).await
    }

    /// Forgets everything, as after a restart from a checkpoint.
    pub async fn clear(&self) -> Result<()> {
        self.link.ask(|_ticket, reply| BufferMsg::Clear { _ticket, reply }).await
    }
}
role_status!(BufferHandle);

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_lm::generate::Finish;

    fn completion(place: usize, policy_version: u64) -> ScoredCompletion {
        let completion = Completion { id: place as u64, tokens: vec![1], logprobs: vec![0.0], finish: Finish::Eos };
        ScoredCompletion {
            place,
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
        assert_eq!(groups[0].completions.iter().map(|c| c.place).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(buffer.take(3).0, []);
    }

    #[test]
    fn old_and_surplus_rollouts_are_refused() {
        let mut buffer = buffer();
        for (prompt, place) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            buffer.insert(prompt, completion(place, prompt as u64)).unwrap();
        }
        let error = buffer.insert(2, completion(0, 0)).unwrap_err().to_string();
        assert!(error.contains("holds 4"), "{error}");
        let (groups, stale) = buffer.take(2);
        assert_eq!((groups.len(), groups[0].prompt, stale), (1, 1, 2));
    }
}
