//! Questions to a judge and its replies.

use std::time::Duration;

use rehearsal_actors::{Placement, RewardError};
use rehearsal_store::Usage;

use super::verdict::{JudgeVerdict, QuestionKind, parse_verdict};

/// A rendered prompt for a judge.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// System message: criterion and instructions. Empty for a template of the user's own.
    pub system: String,
    /// User message: the policy's prompt and the completions to judge.
    pub text: String,
    /// Kind of verdict that is asked for.
    pub kind: QuestionKind,
}

/// A judge's reply to one question.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Generated text; of a local judge, the probabilities of its verdict tokens.
    pub raw: String,
    /// Verdict parsed from `raw`; `None` if it has none.
    pub verdict: Option<JudgeVerdict>,
    /// Calls, tokens and money that the reply cost.
    pub usage: Usage,
}

/// A model that answers questions about completions.
pub trait Judge: Send + Sync {
    /// Name and version of the judge, part of the cache key of its replies.
    fn id(&self) -> &str;

    /// Longest time that a batch of replies may take; `None` for the job's own limit.
    fn timeout(&self) -> Option<Duration> {
        None
    }

    /// Devices that the judge computes on, as in [`rehearsal_actors::Reward::placements`].
    fn placements(&self) -> Vec<Placement> {
        Vec::new()
    }

    /// The verdict in a recorded reply; `None` if it has none.
    fn verdict(&self, kind: QuestionKind, raw: &str) -> Option<JudgeVerdict> {
        parse_verdict(kind, raw)
    }

    /// Replies to all questions, in order.
    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError>;
}
