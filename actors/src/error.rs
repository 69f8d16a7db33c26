//! One error for all handles.

use std::time::Duration;

/// Why a request to a role failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the {role} did not answer within {after:?}; raise its deadline if the work is that long")]
    Timeout { role: &'static str, after: Duration },
    #[error("the {role} died{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Died { role: &'static str, reason: Option<String> },
    #[error("the {role} could not start: {reason}")]
    Start { role: &'static str, reason: String },
    #[error("the {role} died {restarts} times, the last time of: {reason}; it is not started again")]
    GaveUp { role: &'static str, restarts: u32, reason: String },
    #[error("placement `{given}`: {reason}")]
    Placement { given: String, reason: String },
    #[error("the reward {0}")]
    Reward(#[from] crate::RewardError),
    #[error("the buffer holds {held} rollouts and may hold {max}; take some, or raise `buffer.rollouts_max`")]
    BufferFull { held: usize, max: usize },
    #[error("the update's {what} is {value}; the batch and the last good checkpoint are kept, nothing was changed")]
    NotFinite { what: &'static str, value: f64 },
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Model(rehearsal_lm::Error),
    #[error(transparent)]
    Learn(#[from] rehearsal_learn::Error),
    #[error(transparent)]
    Store(#[from] rehearsal_store::Error),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// Whether a role is gone and the job should go on from its last checkpoint once it is back.
    pub fn is_death(&self) -> bool {
        matches!(self, Error::Died { .. })
    }
}

impl From<rehearsal_lm::Error> for Error {
    fn from(e: rehearsal_lm::Error) -> Self {
        match e {
            rehearsal_lm::Error::Cancelled => Error::Cancelled,
            e => Error::Model(e),
        }
    }
}

/// Result of a request.
pub type Result<T> = std::result::Result<T, Error>;
