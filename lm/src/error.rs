//! Errors of this crate: each names the file, tensor or value at fault and, where it can, what to do.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system reports.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system reports.
        source: std::io::Error,
    },
    /// A path is neither a model directory nor a GGUF file.
    #[error("{path} is no model: expected a directory with config.json and *.safetensors, or a .gguf file")]
    NotAModel {
        /// The path.
        path: PathBuf,
    },
    /// A file has another form than expected.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// `config.json` describes a model that this crate does not support.
    #[error("model config: {0}")]
    Config(String),
    /// A tensor of the model is not in its files.
    #[error("tensor `{name}` is missing from {path}; the model needs one of shape {wanted:?}")]
    MissingTensor {
        /// Name of the tensor.
        name: String,
        /// The file or directory.
        path: PathBuf,
        /// Shape that the model needs.
        wanted: Vec<usize>,
    },
    /// A file has a tensor that the model does not.
    #[error(
        "tensor `{name}` in {path} is not part of a `{model_type}` model; check that config.json belongs to the weights"
    )]
    ExtraTensor {
        /// Name of the tensor.
        name: String,
        /// The file or directory.
        path: PathBuf,
        /// Kind of the model.
        model_type: String,
    },
    /// A tensor has another shape than the model needs.
    #[error("tensor `{name}` in {path} has shape {found:?}, but the model needs {wanted:?}")]
    Misshapen {
        /// Name of the tensor.
        name: String,
        /// The file or directory.
        path: PathBuf,
        /// Its shape.
        found: Vec<usize>,
        /// Shape that the model needs.
        wanted: Vec<usize>,
    },
    /// The model has another head than the call needs.
    #[error("{0}")]
    Head(&'static str),
    /// A trained parameter has no gradient.
    #[error("parameter `{0}` has no gradient; every trained parameter must be part of the loss")]
    NoGradient(String),
    /// The tokenizer cannot be read or failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template cannot be parsed or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// A request exceeds the context.
    #[error(
        "rollout {id}: a prompt of {prompt} tokens plus up to {new} new ones exceeds the context of {context} tokens; \
         shorten the prompt or lower `max_new_tokens`"
    )]
    TooLong {
        /// Id of the request.
        id: u64,
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens of the completion at most.
        new: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// A request has no tokens.
    #[error("rollout {id}: the prompt is empty; it needs at least one token")]
    EmptyPrompt {
        /// Id of the request.
        id: u64,
    },
    /// A token id is not in the vocabulary.
    #[error(
        "token {token} is outside the vocabulary of {vocab} tokens; check that tokenizer and model belong together"
    )]
    TokenOutOfVocabulary {
        /// The token id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The probabilities that a completion was sampled from are no numbers.
    #[error(
        "completion {id}: its log-probabilities hold a NaN or an infinity; the model has diverged, or its weights are damaged"
    )]
    NotFinite {
        /// Id of the request.
        id: u64,
    },
    /// A sampling setting is out of its range.
    #[error("sampling: {0}")]
    Sampling(String),
    /// The call was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
