//! Handles to trained models: the policy, which has a language-model head, and the critic, which has a score head.

use std::path::PathBuf;

use candle_core::DType;
use rehearsal_lm::generate::{Completion, Options, Request};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::role::{Link, role_status};
use crate::trained::TrainedMsg;
use crate::{MaskedSequence, ModelSnapshot, Result, StepReport, Tokens, UpdateBatch};

/// Handle to the policy.
#[derive(Clone)]
pub struct PolicyHandle {
    pub(crate) link: Link<TrainedMsg>,
}

impl PolicyHandle {
    /// Samples completions and sends each to `finished` when it ends. Returns the version of the weights that sampled.
    ///
    /// The activations of up to `keep_tokens` tokens are kept for an update on these completions with the same weights:
    /// neither the update nor [`PolicyHandle::logprobs`] then repeats the forward pass. Results do not change, because
    /// a row's activations do not depend on the batch. Nothing is kept if there are more tokens, or on a GPU.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Cancelled`] once `cancel` is cancelled.
    pub async fn generate(
        &self,
        requests: Vec<Request>,
        options: Options,
        keep_tokens: usize,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
    ) -> Result<u64> {
        let options = Box::new(options);
        self.link
            .ask("generate", |_permit, reply| TrainedMsg::Generate {
                requests,
                options,
                keep_tokens,
                finished,
                cancel,
                _permit,
                reply,
            })
            .await
    }

    /// A copy of the current weights, or of the adapters, for [`SamplerHandle::generate`](crate::SamplerHandle::generate). It
    /// has no moments, and later updates do not change it.
    pub async fn weights(&self) -> Result<ModelSnapshot> {
        self.link.ask("weights", |_permit, reply| TrainedMsg::Weights { _permit, reply }).await
    }

    /// Log-probabilities of each completion's tokens under the current weights at a temperature: one list per completion,
    /// in order.
    pub async fn logprobs(&self, tokens: Vec<Tokens>, temperature: f64) -> Result<Vec<Vec<f32>>> {
        self.link
            .ask("log-probabilities", |_permit, reply| TrainedMsg::Logprobs { tokens, temperature, _permit, reply })
            .await
    }

    /// For each sequence, the sum of the log-probabilities of the tokens in its loss mask, at temperature 1.
    pub async fn likelihoods(&self, sequences: Vec<MaskedSequence>) -> Result<Vec<f64>> {
        self.link.ask("likelihoods", |_permit, reply| TrainedMsg::Likelihoods { sequences, _permit, reply }).await
    }
}

/// Handle to a trained model with a score head: the critic, or a reward model in training.
#[derive(Clone)]
pub struct CriticHandle {
    pub(crate) link: Link<TrainedMsg>,
}

impl CriticHandle {
    /// Values of each completion's tokens: one list per completion, in order. A token's value is the estimate for the state
    /// before it.
    pub async fn values(&self, tokens: Vec<Tokens>) -> Result<Vec<Vec<f32>>> {
        self.link.ask("values", |_permit, reply| TrainedMsg::Values { tokens, _permit, reply }).await
    }

    /// Scores of whole sequences, in order, read at the last token that is not padding.
    pub async fn scores(&self, tokens: Vec<Tokens>) -> Result<Vec<f32>> {
        self.link.ask("scores", |_permit, reply| TrainedMsg::Scores { tokens, _permit, reply }).await
    }
}

/// Methods of the handles of all trained models.
macro_rules! trained {
    ($handle:ty) => {
        impl $handle {
            /// Makes one optimizer step. If it fails, weights and optimizer state are unchanged.
            ///
            /// # Errors
            ///
            /// [`crate::Error::Cancelled`] once `cancel` is cancelled, [`crate::Error::NotFinite`] if the loss or the
            /// gradient norm is not finite, and the errors of the objective.
            pub async fn step(&self, batch: UpdateBatch, cancel: CancellationToken) -> Result<StepReport> {
                let batch = Box::new(batch);
                self.link.ask("update", |_permit, reply| TrainedMsg::Step { batch, cancel, _permit, reply }).await
            }

            /// The current weights and optimizer state. They share storage with the model.
            pub async fn snapshot(&self) -> Result<ModelSnapshot> {
                self.link.ask("snapshot", |_permit, reply| TrainedMsg::Snapshot { _permit, reply }).await
            }

            /// Restores weights and optimizer state from a snapshot.
            pub async fn restore(&self, snapshot: ModelSnapshot) -> Result<()> {
                let snapshot = Box::new(snapshot);
                self.link.ask("restore", |_permit, reply| TrainedMsg::Restore { snapshot, _permit, reply }).await
            }

            /// Returns to the weights and the optimizer state at the start of training.
            pub async fn reset(&self) -> Result<()> {
                self.link.ask("reset", |_permit, reply| TrainedMsg::Reset { _permit, reply }).await
            }

            /// Writes the weights, or their moving average if there is one, as a Hugging Face directory in the given type.
            /// Adapters are merged into the weights, and also written to `adapter/` in PEFT's format.
            pub async fn export(&self, directory: PathBuf, dtype: DType) -> Result<()> {
                self.link.ask("export", |_permit, reply| TrainedMsg::Export { directory, dtype, _permit, reply }).await
            }
        }
        role_status!($handle);
    };
}
trained!(PolicyHandle);
trained!(CriticHandle);
