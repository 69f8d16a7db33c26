//! Language models: loading and saving, forward and backward passes, LoRA, generation, tokenisation.
//!
//! This crate knows no objective, actor, store, clock or log.
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use rehearsal_lm::generate::{Generator, Options, Request, Sampling, completion_text};
//! use rehearsal_lm::{Checkpoint, Message};
//!
//! # fn main() -> rehearsal_lm::Result<()> {
//! let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct".as_ref())?;
//! let prompt = checkpoint.text.encode_chat(&[Message::user("What does the fox do?")])?.into();
//! let options = Options {
//!     sampling: Sampling { temperature: 0.7, ..Sampling::default() },
//!     max_new_tokens: 64,
//!     min_new_tokens: 0,
//!     eos: checkpoint.architecture.eos.clone(),
//!     stop: Vec::new(),
//!     seed: 0,
//!     batch: 1,
//! };
//! let decoder = checkpoint.frozen(&Device::Cpu, DType::F32)?;
//! let mut tokens = Vec::new();
//! let requests = vec![Request { id: 0, prompt }];
//! Generator::new(&decoder)?.generate(requests, &options, None, &|| false, &mut |c| tokens = c.tokens)?;
//! println!("{}", completion_text(&checkpoint.text, &tokens, &[])?);
//! # Ok(())
//! # }
//! ```

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
pub use model::{Architecture, Batch, Decoder, Gradients, HeadKind, Parameters, Sequence, add_floats, add_gradients};
pub use rehearsal_kernels::gemm::Precision;
pub use rehearsal_kernels::{random, slow_build};
pub use text::{ChatTemplate, Message, Text};
