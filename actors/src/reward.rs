//! The reward: whatever knows better than the model, behind one trait.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_lm::Message;
use rehearsal_lm::generate::Finish;
use rehearsal_store::Exchange;

use crate::role::{Build, Link, Machine, Reply, Ticket, answer, local_message, role_status};
use crate::{Placement, Result, Tokens};

/// A completion to be judged.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// The prompt as text; a conversation of several turns as `role: content`, turn by turn.
    pub prompt: String,
    /// The prompt as messages; empty for a bare text.
    pub messages: Arc<Vec<Message>>,
    /// What the policy said, without special tokens and stop texts.
    pub completion: String,
    /// Length in tokens.
    pub tokens: usize,
    /// Prompt and completion as the policy's tokens.
    pub ids: Tokens,
    /// Why the completion ended.
    pub finish: Finish,
    /// A text column of the prompt's row, such as a reference answer.
    pub answer: Option<String>,
    /// Row of the prompt in its file.
    pub row: u64,
}

/// A score and why.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Judged {
    /// Higher is better; finite.
    pub score: f64,
    /// In the scorer's words; may be empty.
    pub reason: String,
    /// What was asked in words, and what was said; for a comparison, with the first of the compared completions.
    pub exchanges: Vec<Exchange>,
}

impl Judged {
    /// A score with its reason.
    pub fn new(score: f64, reason: impl Into<String>) -> Self {
        Self { score, reason: reason.into(), exchanges: Vec::new() }
    }
}

impl From<f64> for Judged {
    fn from(score: f64) -> Self {
        Self::new(score, "")
    }
}

/// Why a reward gave no score.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RewardError {
    #[error("`{name}` failed on row {row}: {reason}")]
    Failed { name: String, row: u64, reason: String },
    #[error("`{name}` gave {score} for row {row}; a score must be a finite number")]
    NotFinite { name: String, row: u64, score: f64 },
    #[error("`{name}` has used up its budget ({spent}); raise `{key}`, and resume")]
    Budget { name: String, spent: String, key: &'static str },
    #[error("the job was asked to stop while `{name}` was at work")]
    Stopped { name: String },
    #[error("`{name}` gave {found} scores for {wanted} completions; one each is needed")]
    Count { name: String, found: usize, wanted: usize },
}

/// Something that knows better than the model.
///
/// Runs on a thread of its own, so it may block. A panic restarts the role; an error stops the job.
pub trait Reward: Send + Sync + 'static {
    /// Name for logs and errors.
    fn name(&self) -> &str;

    /// Whether a score says how a completion compares with the others of its prompt, and nothing by itself.
    fn compares(&self) -> bool {
        false
    }

    /// How long scores may take; `None` leaves it to the job's limits.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Devices on which it takes its turn with other roles. Elsewhere (servers, people, a closure that is quick) it may be asked
    /// while the policy generates.
    fn occupies(&self) -> Vec<Placement> {
        Vec::new()
    }

    /// A score for each sample, in order; the completions of a prompt stand side by side.
    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError>;
}

/// A reward from a closure that scores one completion.
pub struct RewardFn<F> {
    name: String,
    f: F,
}

impl<F, J, E> RewardFn<F>
where
    F: Fn(&Sample) -> std::result::Result<J, E> + Send + Sync + 'static,
    J: Into<Judged>,
    E: std::fmt::Display,
{
    /// Names a closure.
    pub fn new(name: impl Into<String>, f: F) -> Self {
        Self { name: name.into(), f }
    }
}

impl<F, J, E> Reward for RewardFn<F>
where
    F: Fn(&Sample) -> std::result::Result<J, E> + Send + Sync + 'static,
    J: Into<Judged>,
    E: std::fmt::Display,
{
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        let failed =
            |s: &Sample, e: E| RewardError::Failed { name: self.name.clone(), row: s.row, reason: e.to_string() };
        samples.iter().map(|s| (self.f)(s).map(Into::into).map_err(|e| failed(s, e))).collect()
    }
}

pub(crate) enum RewardMsg {
    Score { samples: Vec<Sample>, _ticket: Ticket, reply: Reply<Vec<Judged>> },
}
local_message!(RewardMsg);

pub(crate) struct Scorer(Arc<dyn Reward>);

impl Scorer {
    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>> {
        let judged = self.0.score(samples)?;
        let name = || self.0.name().to_string();
        if judged.len() != samples.len() {
            return Err(RewardError::Count { name: name(), found: judged.len(), wanted: samples.len() }.into());
        }
        match judged.iter().zip(samples).find(|(j, _)| !j.score.is_finite()) {
            Some((j, s)) => Err(RewardError::NotFinite { name: name(), row: s.row, score: j.score }.into()),
            None => Ok(judged),
        }
    }
}

impl Machine for Scorer {
    type Message = RewardMsg;

    fn apply(&mut self, message: RewardMsg) {
        let RewardMsg::Score { samples, reply, .. } = message;
        answer(reply, self.score(&samples));
    }
}

/// Speaks to the reward.
#[derive(Clone)]
pub struct RewardHandle {
    pub(crate) link: Link<RewardMsg>,
    pub(crate) name: Arc<str>,
    pub(crate) compares: bool,
    pub(crate) occupies: Arc<[Placement]>,
}

impl RewardHandle {
    pub(crate) fn build(reward: Arc<dyn Reward>) -> Build<Scorer> {
        Arc::new(move || Ok(Scorer(reward.clone())))
    }

    /// Name of the reward.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// [`Reward::compares`].
    pub fn compares(&self) -> bool {
        self.compares
    }

    /// [`Reward::occupies`].
    pub fn occupies(&self) -> &[Placement] {
        &self.occupies
    }

    /// Scores completions, in order; every score is finite.
    pub async fn score(&self, samples: Vec<Sample>) -> Result<Vec<Judged>> {
        self.link.ask(|_ticket, reply| RewardMsg::Score { samples, _ticket, reply }).await
    }
}
role_status!(RewardHandle);

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(row: u64) -> Sample {
        let ids = Tokens { prompt: Arc::default(), completion: Arc::default() };
        Sample { prompt: "p".into(), completion: "c".into(), tokens: 1, ids, row, ..Sample::default() }
    }

    fn scorer(f: impl Fn(&Sample) -> std::result::Result<f64, String> + Send + Sync + 'static) -> Scorer {
        Scorer(Arc::new(RewardFn::new("mine", f)))
    }

    #[test]
    fn bad_scores_are_refused_with_their_row() {
        assert_eq!(scorer(|s| Ok(s.row as f64)).score(&[sample(1), sample(2)]).unwrap()[1].score, 2.0);
        let error = scorer(|_| Ok(f64::NAN)).score(&[sample(7)]).unwrap_err().to_string();
        assert!(error.contains("mine") && error.contains("row 7") && error.contains("NaN"), "{error}");
        let error = scorer(|_| Err("no idea".into())).score(&[sample(7)]).unwrap_err().to_string();
        assert!(error.contains("no idea") && error.contains("row 7"), "{error}");
    }
}
