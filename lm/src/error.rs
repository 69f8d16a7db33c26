//! What can go wrong with a model: each variant names the file, tensor or value and what to do.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path} is no model: expected a directory with config.json and *.safetensors, or a .gguf file")]
    NotAModel { path: PathBuf },
    #[error("{path}: {reason}")]
    Malformed { path: PathBuf, reason: String },
    #[error("model config: {0}")]
    Config(String),
    #[error("tensor `{name}` is missing from {path}; the model needs {wanted:?}")]
    MissingTensor { name: String, path: PathBuf, wanted: Vec<usize> },
    #[error("tensor `{name}` in {path} belongs to no part of a `{model_type}` model; is config.json the right one?")]
    ExtraTensor { name: String, path: PathBuf, model_type: String },
    #[error("tensor `{name}` in {path} has shape {found:?}; config.json asks for {wanted:?}")]
    Misshapen { name: String, path: PathBuf, found: Vec<usize>, wanted: Vec<usize> },
    #[error("{0}")]
    Head(&'static str),
    #[error("parameter `{0}` got no gradient; it is not part of the computation, so it cannot be trained")]
    NoGradient(String),
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    Template(String),
    #[error(
        "rollout {id}: prompt of {prompt} tokens plus {new} new ones exceed the context of {context}; shorten the prompt or lower `max_new_tokens`"
    )]
    TooLong { id: u64, prompt: usize, new: usize, context: usize },
    #[error("rollout {id}: the prompt is empty; a model needs at least one token to continue")]
    EmptyPrompt { id: u64 },
    #[error("token {token} is outside the vocabulary of {vocab}; do tokenizer and model belong together?")]
    ForeignToken { token: u32, vocab: usize },
    #[error("sampling: {0}")]
    Sampling(String),
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
