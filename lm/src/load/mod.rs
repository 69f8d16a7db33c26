//! Loads and saves models: Hugging Face directories, GGUF files, and files held in memory.

mod check;
mod checkpoint;
pub(crate) mod file;
mod gguf;
mod gguf_header;
mod gguf_tokenizer;
mod hf;
mod open;
mod save;
mod tensors;

pub use checkpoint::{Checkpoint, Files};
pub use gguf::GgufText;
pub use tensors::tensors_of;
