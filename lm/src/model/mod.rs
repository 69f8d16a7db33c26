//! One decoder for Llama, Mistral, Qwen, Gemma and GPT-2: its architecture, and its parameters by their Hugging Face
//! names. [`forward`](crate::forward) runs it.

mod architecture;
mod batch;
mod config;
mod decoder;
mod gradients;
mod layers;
mod memory;
mod names;

pub use architecture::{Architecture, HeadKind, NormKind, Parameters, Position, Rope, Scaling};
pub use batch::{Batch, Sequence};
pub(crate) use config::with_head;
pub use decoder::Decoder;
pub use gradients::{Gradients, add_floats, add_gradients};
pub(crate) use layers::{Block, Layers, Norm, Projection};
pub(crate) use names::{LANGUAGE_HEAD, SCORE_HEAD};
pub use rehearsal_kernels::activation::Activation;
