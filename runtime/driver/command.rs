//! What others ask of a running job between two of its steps.

use std::path::PathBuf;

use candle_core::DType;
use tokio::sync::oneshot;

use crate::error::Result;

/// Sends the step after which the command was carried out, or what went wrong.
pub type CommandReply = oneshot::Sender<Result<u64>>;

/// A command to the driver. It is carried out between two steps; the job goes on whatever comes of it.
pub enum Command {
    /// Saves a checkpoint, unless the current state is saved already.
    Checkpoint { reply: CommandReply },
    /// Writes the trained model as a Hugging Face directory.
    Export { directory: PathBuf, dtype: DType, reply: CommandReply },
}
