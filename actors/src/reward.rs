//! The reward: any source of scores for completions, behind one trait.

use std::sync::Arc;
use std::time::Duration;

use rehearsal_lm::Message;
use rehearsal_lm::generate::Finish;
use rehearsal_store::Exchange;

use crate::role::{Build, Link, Permit, Reply, StateMachine, answer, local_message, role_status};
use crate::{Placement, Result, Tokens};

/// A completion to be scored.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// The prompt as text; a conversation of several turns as `role: content`, turn by turn.
    pub prompt: String,
    /// The prompt as messages; empty for a bare text.
    pub messages: Arc<Vec<Message>>,
    /// The completion as text, without special tokens and stop strings.
    pub completion: String,
    /// Length of the completion in tokens.
    pub tokens: usize,
    /// Prompt and completion as token ids of the policy's tokenizer.
    pub ids: Tokens,
    /// Why the completion ended.
    pub finish: Finish,
    /// The answer column of the prompt's row, such as a reference solution.
    pub answer: Option<String>,
    /// Row of the prompt in its file, for error messages.
    pub row: u64,
}

/// The score of a completion, with the reason for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Judged {
    /// Higher is better; finite.
    pub score: f64,
    /// Explanation given by the scorer; may be empty.
    pub reason: String,
    /// The requests to judges that led to the score, and their replies. Those of a comparison are kept with the first of
    /// the compared completions.
    pub exchanges: Vec<Exchange>,
    /// Whether there is no score: the completion is left out, for the reason given.
    pub skipped: bool,
}

impl Judged {
    /// No score, and why.
    pub fn skipped(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), skipped: true, ..Self::default() }
    }

    /// A score with a reason.
    pub fn new(score: f64, reason: impl Into<String>) -> Self {
        Self { score, reason: reason.into(), ..Self::default() }
    }
}

impl From<f64> for Judged {
    fn from(score: f64) -> Self {
        Self::new(score, "")
    }
}

/// Why a reward returned no scores.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RewardError {
    /// A completion could not be scored.
    #[error("`{name}` failed on row {row}: {reason}")]
    Failed {
        /// Name of the reward.
        name: String,
        /// Row of the prompt in its file, from 0.
        row: u64,
        /// What failed.
        reason: String,
    },
    /// A score is not a finite number.
    #[error("`{name}` returned {score} for row {row}; a score must be a finite number")]
    NotFinite {
        /// Name of the reward.
        name: String,
        /// Row of the prompt in its file, from 0.
        row: u64,
        /// The score.
        score: f64,
    },
    /// A judge may not be asked again.
    #[error("`{name}` has used up its budget ({spent}); raise `{key}` and resume the job")]
    Budget {
        /// Name of the judge.
        name: String,
        /// What was spent, with its unit.
        spent: String,
        /// Key that limits it.
        key: &'static str,
    },
    /// The job was asked to stop.
    #[error("the job was stopped while `{name}` was computing scores")]
    Stopped {
        /// Name of the reward.
        name: String,
    },
    /// The number of scores is not that of the completions.
    #[error("`{name}` returned {found} scores for {wanted} completions; it must return one for each")]
    Count {
        /// Name of the reward.
        name: String,
        /// Number of scores.
        found: usize,
        /// Number of completions.
        wanted: usize,
    },
}

/// A source of scores for completions: rules, trained reward models, judges, people, a closure.
///
/// It is called on the role's own thread, so it may block. A panic restarts the role; an error stops the job.
pub trait Reward: Send + Sync + 'static {
    /// Name of the reward in logs and errors.
    fn name(&self) -> &str;

    /// Whether a score only ranks a completion among the completions of its prompt, and has no meaning across prompts.
    fn is_relative(&self) -> bool {
        false
    }

    /// How long a call of [`Reward::score`] may take; `None` for the job's limit.
    fn timeout(&self) -> Option<Duration> {
        None
    }

    /// Most samples of one call; `None` for any number. The outcomes of a call are logged together when it returns.
    fn batch(&self) -> Option<usize> {
        None
    }

    /// Whether a call may be abandoned when the job is asked to stop: the job ends without waiting for it, and its scores
    /// are lost. One that is not abandoned should watch for the stop itself.
    fn may_be_abandoned(&self) -> bool {
        false
    }

    /// The devices that the reward computes on and shares with other roles. A reward that shares none with the policy (a
    /// server, people, a cheap closure) may be called while the policy generates.
    fn placements(&self) -> Vec<Placement> {
        Vec::new()
    }

    /// Scores completions: one finite score for each sample, in order. The completions of a prompt are adjacent.
    ///
    /// # Errors
    ///
    /// A [`RewardError`] that stops the job, such as [`RewardError::Failed`] with the row that could not be scored.
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
    /// A reward from a closure and a name. The closure returns a score, or a [`Judged`] with a reason.
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

    fn may_be_abandoned(&self) -> bool {
        true
    }

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        let failed =
            |s: &Sample, e: E| RewardError::Failed { name: self.name.clone(), row: s.row, reason: e.to_string() };
        samples.iter().map(|s| (self.f)(s).map(Into::into).map_err(|e| failed(s, e))).collect()
    }
}

pub(crate) enum RewardMsg {
    Score { samples: Vec<Sample>, _permit: Permit, reply: Reply<Vec<Judged>> },
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

impl StateMachine for Scorer {
    type Message = RewardMsg;

    fn apply(&mut self, message: RewardMsg) {
        let RewardMsg::Score { samples, reply, .. } = message;
        answer(reply, self.score(&samples));
    }
}

/// Handle to the reward.
#[derive(Clone)]
pub struct RewardHandle {
    pub(crate) link: Link<RewardMsg>,
    pub(crate) name: Arc<str>,
    pub(crate) is_relative: bool,
    pub(crate) placements: Arc<[Placement]>,
    pub(crate) batch: Option<usize>,
    pub(crate) may_be_abandoned: bool,
}

impl RewardHandle {
    pub(crate) fn build(reward: Arc<dyn Reward>) -> Build<Scorer> {
        Arc::new(move || Ok(Scorer(reward.clone())))
    }

    /// [`Reward::name`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// [`Reward::is_relative`].
    pub fn is_relative(&self) -> bool {
        self.is_relative
    }

    /// [`Reward::placements`].
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    /// [`Reward::batch`].
    pub fn batch(&self) -> Option<usize> {
        self.batch
    }

    /// [`Reward::may_be_abandoned`].
    pub fn may_be_abandoned(&self) -> bool {
        self.may_be_abandoned
    }

    /// Scores completions: one finite score for each sample, in order.
    pub async fn score(&self, samples: Vec<Sample>) -> Result<Vec<Judged>> {
        self.link
            .ask(&format!("score by {}", self.name), |_permit, reply| RewardMsg::Score { samples, _permit, reply })
            .await
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
