//! Handles to trained models: the policy, which samples, and the critic, which gives scores.

use std::path::PathBuf;

use candle_core::DType;
use rehearsal_lm::generate::{Completion, Options, Request};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::role::{Link, role_status};
use crate::trained::TrainedMsg;
use crate::{Marked, ModelSnapshot, Result, StepReport, Tokens, UpdateBatch};

/// Speaks to the policy.
#[derive(Clone)]
pub struct PolicyHandle {
    pub(crate) link: Link<TrainedMsg>,
}

impl PolicyHandle {
    /// Generates; each completion is sent to `finished` as it ends. Ends early, with [`crate::Error::Cancelled`], when
    /// `cancel` is.
    ///
    /// What is computed of `keep_tokens` tokens at most is kept for an update on these completions with the weights that
    /// said them: neither it nor [`PolicyHandle::logprobs`] computes it again. That changes no result, since a row is the
    /// same bits wherever it goes through the model. Where there are more tokens, and on a GPU, nothing is kept.
    pub async fn generate(
        &self,
        requests: Vec<Request>,
        options: Options,
        keep_tokens: usize,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
    ) -> Result<()> {
        let options = Box::new(options);
        self.link
            .ask(|_ticket, reply| TrainedMsg::Generate {
                requests,
                options,
                keep_tokens,
                finished,
                cancel,
                _ticket,
                reply,
            })
            .await
    }

    /// Log-probabilities of completions, token by token, under the current weights.
    pub async fn logprobs(&self, tokens: Vec<Tokens>, temperature: f64) -> Result<Vec<Vec<f32>>> {
        self.link.ask(|_ticket, reply| TrainedMsg::Logprobs { tokens, temperature, _ticket, reply }).await
    }

    /// Summed log-probabilities of the marked tokens of each sequence.
    pub async fn likelihoods(&self, sequences: Vec<Marked>) -> Result<Vec<f64>> {
        self.link.ask(|_ticket, reply| TrainedMsg::Likelihoods { sequences, _ticket, reply }).await
    }
}

/// Speaks to the critic or the reward model in training: a model that gives scores.
#[derive(Clone)]
pub struct CriticHandle {
    pub(crate) link: Link<TrainedMsg>,
}

impl CriticHandle {
    /// Values of completions, token by token: that of a token is read before it.
    pub async fn values(&self, tokens: Vec<Tokens>) -> Result<Vec<Vec<f32>>> {
        self.link.ask(|_ticket, reply| TrainedMsg::Values { tokens, _ticket, reply }).await
    }

    /// Scores of whole sequences.
    pub async fn scores(&self, tokens: Vec<Tokens>) -> Result<Vec<f32>> {
        self.link.ask(|_ticket, reply| TrainedMsg::Scores { tokens, _ticket, reply }).await
    }
}

/// What every trained model answers.
macro_rules! trained {
    ($handle:ty) => {
        impl $handle {
            /// One optimiser step. When it fails, the weights are as before.
            pub async fn step(&self, batch: UpdateBatch, cancel: CancellationToken) -> Result<StepReport> {
                let batch = Box::new(batch);
                self.link.ask(|_ticket, reply| TrainedMsg::Step { batch, cancel, _ticket, reply }).await
            }

            /// Weights and optimiser as they are; they share storage with the model.
            pub async fn snapshot(&self) -> Result<ModelSnapshot> {
                self.link.ask(|_ticket, reply| TrainedMsg::Snapshot { _ticket, reply }).await
            }

            /// Goes back to a snapshot.
            pub async fn restore(&self, snapshot: ModelSnapshot) -> Result<()> {
                let snapshot = Box::new(snapshot);
                self.link.ask(|_ticket, reply| TrainedMsg::Restore { snapshot, _ticket, reply }).await
            }

            /// Writes the weights, or their average where there is one, as a Hugging Face directory.
            pub async fn export(&self, directory: PathBuf, dtype: DType) -> Result<()> {
                self.link.ask(|_ticket, reply| TrainedMsg::Export { directory, dtype, _ticket, reply }).await
            }
        }
        role_status!($handle);
    };
}
trained!(PolicyHandle);
trained!(CriticHandle);
