//! Objectives: what an optimizer step minimizes. Each carries its own data and runs it through the model, micro-batch
//! by micro-batch.

mod demonstrations;
mod pairs;
mod pass;
mod rankings;
mod rollouts;
mod values;

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

pub use demonstrations::{Demonstrations, MaskedSequence};
pub use pairs::{PairTokens, Pairs};
pub(crate) use pass::Sums;
pub use pass::{Cut, Leaf, Pass, Stats, StepTimes};
pub use rankings::{Ranking, Rankings};
pub use rollouts::{RolloutTokens, Rollouts};
pub use values::{ValueTokens, Values};

use crate::{Error, Result, Tokens};

/// The loss of one optimizer step together with the data that it is computed on.
///
/// The trained model calls [`Objective::accumulate`] once for each leaf of a step (there is one, unless the job asks for more), on
/// a thread that owns a copy of the model, and applies the accumulated gradients when all calls returned `Ok`. An error, or a loss or gradient norm that is not finite, leaves the
/// weights and the optimizer state unchanged. `Debug` is what a job writes into its report when that happens.
///
/// The objectives of this crate are [`Demonstrations`], [`Pairs`], [`Rollouts`], [`Rankings`] and [`Values`]. Another one
/// needs nothing but the public methods of [`Pass`]. For resume to be exact, `accumulate` must be a function of
/// the objective's fields, the weights and the temperature: no clock, no shared random number generator.
///
/// # Example
///
/// Unlikelihood training (Welleck et al. 2020): minimizes the mean of `−log(1 − p)` over the tokens of unwanted
/// completions.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use rehearsal_actors::{Objective, Pass, PolicyHandle, Result, StepReport, Tokens, UpdateBatch};
/// use rehearsal_lm::Batch;
///
/// #[derive(Debug)]
/// struct Unlikelihood {
///     unwanted: Vec<Tokens>,
/// }
///
/// impl Objective for Unlikelihood {
///     fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()> {
///         let total: usize = self.unwanted.iter().map(|t| t.completion.len()).sum();
///         let size = |t: &Tokens| t.prompt.len() + t.completion.len();
///         for micro_batch in pass.micro_batches(&self.unwanted, size) {
///             let batch = Batch::new(micro_batch?.iter().map(Tokens::sequence));
///             pass.micro_step(
///                 batch.tokens(),
///                 |model, temperature| model.forward(&batch, temperature),
///                 |pass, logprobs| {
///                     let losses = (1.0 - logprobs.exp()?)?.log()?.neg()?;
///                     let sum = losses.sum_all()?;
///                     pass.add("unlikelihood", f64::from(sum.to_scalar::<f32>()?), batch.scored());
///                     Ok((sum / total as f64)?)
///                 },
///             )?;
///         }
///         Ok(())
///     }
/// }
///
/// # async fn f(policy: PolicyHandle, unwanted: Vec<Tokens>) -> Result<StepReport> {
/// let objective = Arc::new(Unlikelihood { unwanted });
/// let batch = UpdateBatch { objective, learning_rate: 1e-6, temperature: 1.0 };
/// policy.step(batch, Default::default()).await
/// # }
/// ```
pub trait Objective: fmt::Debug + Send + Sync + 'static {
    /// Runs a leaf's part of the data, which [`Pass::micro_batches`] returns, through the model and adds its loss, gradients
    /// and statistics to `pass`.
    ///
    /// The shares that the micro-batches return add up to the loss of the whole step, so a mean is divided by the
    /// number of sequences or tokens of the step, not of the micro-batch.
    ///
    /// # Errors
    ///
    /// [`Error::Cancelled`](crate::Error::Cancelled) from [`Pass::micro_batches`] once the step is cancelled, and
    /// whatever the model, the loss or a check of the data returns.
    fn accumulate(&self, pass: &mut Pass<'_>) -> Result<()>;

    /// The objective as it goes to members in other processes ([`Ranks`](crate::Ranks)); `None`, the default, for one that
    /// cannot leave its process.
    fn portable(&self) -> Option<Portable> {
        None
    }
}

/// An objective that can go to another process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Portable {
    /// See [`Demonstrations`].
    Demonstrations(Demonstrations),
    /// See [`Pairs`].
    Pairs(Pairs),
    /// See [`Rollouts`].
    Rollouts(Rollouts),
    /// See [`Rankings`].
    Rankings(Rankings),
    /// See [`Values`].
    Values(Values),
}

impl Portable {
    pub(crate) fn into_objective(self) -> Arc<dyn Objective> {
        match self {
            Self::Demonstrations(objective) => Arc::new(objective),
            Self::Pairs(objective) => Arc::new(objective),
            Self::Rollouts(objective) => Arc::new(objective),
            Self::Rankings(objective) => Arc::new(objective),
            Self::Values(objective) => Arc::new(objective),
        }
    }
}

/// Number of tokens of a sequence that shares no prompt.
fn length(tokens: &Tokens) -> usize {
    tokens.prompt.len() + tokens.completion.len()
}

/// Number of completion tokens that the model gives a log-probability or a value for: all, except that without a prompt
/// nothing predicts the first one.
fn scored_tokens(tokens: &Tokens) -> usize {
    tokens.completion.len().saturating_sub(usize::from(tokens.prompt.is_empty()))
}

/// Checks that `item`'s list `name` has `len` entries, one for each scored token.
fn check_per_token(kind: &str, item: usize, name: &str, len: usize, tokens: &Tokens) -> Result<()> {
    let wanted = scored_tokens(tokens);
    if len == wanted {
        return Ok(());
    }
    Err(Error::Data(format!("{kind} {item} of the batch has {len} `{name}` for {wanted} completion tokens")))
}

/// The values of a tensor `[n]`, as f64.
fn values_f64(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.to_vec1()?)
}

/// The sum of a tensor's values, accumulated in f64.
fn sum_f64(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.sum_all()?.to_scalar()?)
}

/// A tensor `[n]` of `values`, with the type and the device of `like`.
fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::new(values, like.device())?.to_dtype(like.dtype())?)
}
