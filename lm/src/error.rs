//! Errors of this crate: each names the file, tensor or value at fault and, where it can, what to do.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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
    #[error("tensor `{name}` is missing from {path}; the model needs one of shape {wanted:?}")]
    MissingTensor { name: String, path: PathBuf, wanted: Vec<usize> },
    #[error(
        "tensor `{name}` in {path} is not part of a `{model_type}` model; check that config.json belongs to the weights"
    )]
    ExtraTensor { name: String, path: PathBuf, model_type: String },
    #[error("tensor `{name}` in {path} has shape {found:?}, but the model needs {wanted:?}")]
    Misshapen { name: String, path: PathBuf, found: Vec<usize>, wanted: Vec<usize> },
    #[error("{0}")]
    Head(&'static str),
    #[error("parameter `{0}` has no gradient; every trained parameter must be part of the loss")]
    NoGradient(String),
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    Template(String),
    #[error(
        "rollout {id}: a prompt of {prompt} tokens plus up to {new} new ones exceeds the context of {context} tokens; \
         shorten the prompt or lower `max_new_tokens`"
    )]
    TooLong { id: u64, prompt: usize, new: usize, context: usize },
    #[error("rollout {id}: the prompt is empty; it needs at least one token")]
    EmptyPrompt { id: u64 },
    #[error(
        "token {token} is outside the vocabulary of {vocab} tokens; check that tokenizer and model belong together"
    )]
    TokenOutOfVocabulary { token: u32, vocab: usize },
    #[error("sampling: {0}")]
    Sampling(String),
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
