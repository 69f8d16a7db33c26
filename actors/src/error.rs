//! The error of all handles.

use std::time::Duration;

/// Why a request to a role failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("the {role} did not reply within {after:?}; if the request needs longer, raise the deadline")]
    Timeout { role: &'static str, after: Duration },
    #[error("the {role} stopped{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Died { role: &'static str, reason: Option<String> },
    #[error("the {role} could not start: {reason}")]
    Start { role: &'static str, reason: String },
    #[error("the {role} stopped {restarts} times, most recently because: {reason}; it is not restarted again")]
    GaveUp { role: &'static str, restarts: u32, reason: String },
    #[error("placement `{given}`: {reason}")]
    Placement { given: String, reason: String },
    #[error("the reward {0}")]
    Reward(#[from] crate::RewardError),
    #[error("the buffer holds {held} rollouts and may hold {max}; take some, or raise `buffer.rollouts_max`")]
    BufferFull { held: usize, max: usize },
    #[error("the update's {what} is {value}; nothing was changed, and the batch and the last good checkpoint are kept")]
    NotFinite { what: &'static str, value: f64 },
    #[error("the data of the training step is inconsistent: {0}")]
    Data(String),
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
    /// Whether a role stopped, so that the job must resume from its last checkpoint once the role is restarted.
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
