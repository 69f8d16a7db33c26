//! Language models: loading and saving, forward and backward passes, LoRA, generation, tokenisation.
//!
//! This crate knows no objective, actor, store, clock or log.

mod cpu;
pub mod error;
pub mod forward;
pub mod generate;
mod gpu;
pub mod load;
pub mod lora;
pub mod model;
pub mod ops;
mod pass;
#[cfg(test)]
mod testing;
pub mod text;

pub use cpu::Recording;
pub use error::{Error, Result};
pub use forward::Forward;
pub use load::{Checkpoint, Files, tensors_of};
pub use lora::{Lora, LoraConfig};
pub use model::{Architecture, Batch, Decoder, Gradients, HeadKind, Parameters, Sequence};
pub use rehearsal_kernels::gemm::Precision;
pub use rehearsal_kernels::{random, slow_build};
pub use text::{ChatTemplate, Message, Text};
