//! The error of all handles.

use std::time::Duration;

/// Why a request to a role failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A role did not reply in time.
    #[error("the {role} did not reply within {after:?}; if the request needs longer, raise the deadline")]
    Timeout {
        /// Name of the role.
        role: &'static str,
        /// Time that was waited.
        after: Duration,
    },
    /// A role stopped before it replied. The director starts it again.
    #[error("the {role} stopped{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Died {
        /// Name of the role.
        role: &'static str,
        /// Its panic, if it is known.
        reason: Option<String>,
    },
    /// A role could not be started.
    #[error("the {role} could not start: {reason}")]
    Start {
        /// Name of the role.
        role: &'static str,
        /// What failed.
        reason: String,
    },
    /// A role stopped more often than it may be restarted.
    #[error("the {role} stopped {restarts} times, most recently because: {reason}; it is not restarted again")]
    GaveUp {
        /// Name of the role.
        role: &'static str,
        /// How often it was restarted.
        restarts: u32,
        /// Why it stopped last.
        reason: String,
    },
    /// A device that cannot be used.
    #[error("placement `{given}`: {reason}")]
    Placement {
        /// The device as it was named.
        given: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The reward failed.
    #[error("the reward {0}")]
    Reward(#[from] crate::RewardError),
    /// The buffer cannot hold another group.
    #[error("the buffer holds {held} rollouts and may hold {max}; take some, or raise `buffer.rollouts_max`")]
    BufferFull {
        /// Rollouts that it holds.
        held: usize,
        /// Rollouts that it may hold.
        max: usize,
    },
    /// A member in another process failed.
    #[error("rank {rank}: {reason}")]
    Rank {
        /// Which process.
        rank: usize,
        /// What failed there.
        reason: String,
    },
    /// A loss or gradient is not a finite number. Nothing was changed.
    #[error("the update's {what} is {value}; nothing was changed, and the batch and the last good checkpoint are kept")]
    NotFinite {
        /// What is not finite.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// An update has made weights that are no numbers.
    #[error(
        "the weights hold a NaN or an infinity after the update; the last checkpoint is kept: resume from it with a lower \
         `optimizer.learning_rate`"
    )]
    Diverged,
    /// The data of a training step contradict each other.
    #[error("the data of the training step is inconsistent: {0}")]
    Data(String),
    /// A checkpoint does not fit the models.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// The job was asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// A model failed.
    #[error(transparent)]
    Model(rehearsal_lm::Error),
    /// An objective or the optimizer failed.
    #[error(transparent)]
    Learn(#[from] rehearsal_learn::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] rehearsal_store::Error),
    /// A tensor operation failed.
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
