//! Language models: loading and saving, forward and backward passes, LoRA, generation, tokenisation.
//!
//! This crate knows no objective, no actor, no store, no clock and no log.

pub mod error;
pub mod generate;
pub mod gpu;
pub mod kernels;
pub mod load;
pub mod lora;
pub mod model;
pub mod ops;
mod pass;
pub mod random;
#[cfg(test)]
mod testing;
pub mod text;

pub use error::{Error, Result};
pub use kernels::gemm::Precision;
pub use load::{Checkpoint, Files};
pub use lora::{Lora, LoraConfig};
pub use model::{Architecture, Batch, Decoder, Forward, Gradients, HeadKind, Parameters, Sequence};
pub use pass::Recording;
pub use text::{ChatTemplate, Message, Text};
