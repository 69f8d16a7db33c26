//! In place of the models of candle-transformers, in a build without the feature `encoders`: types that cannot be made.

use std::path::Path;

use rehearsal_actors::Devices;
use rehearsal_lm::Text;

use crate::features::ENCODERS;

/// A BERT model; none exists in this build.
pub enum BertEncoder {}

impl BertEncoder {
    /// Fails.
    pub fn open(path: &Path) -> Result<Self, String> {
        Err(format!("the encoder in {} needs {ENCODERS}", path.display()))
    }

    /// Name of the model.
    pub fn name(&self) -> &str {
        match *self {}
    }

    /// Whether it classifies.
    pub fn is_classifier(&self) -> bool {
        match *self {}
    }

    /// The embedding of a text.
    pub fn embedding(&self, _: &str, _: &Devices) -> Result<Vec<f32>, String> {
        match *self {}
    }

    /// The score of a pair of texts.
    pub fn classify(&self, _: &str, _: &str, _: &Devices) -> Result<f64, String> {
        match *self {}
    }
}

/// A judge of an architecture that is not trained; none exists in this build.
pub enum CausalModel {}

impl CausalModel {
    /// False.
    pub fn supports(_: &Path) -> bool {
        false
    }

    /// Fails.
    pub fn open(path: &Path, _: Option<u32>) -> Result<Self, String> {
        Err(format!("the judge in {} needs {ENCODERS}", path.display()))
    }

    /// Hash of the weights.
    pub fn fingerprint(&self) -> &str {
        match *self {}
    }

    /// Tokenizer and chat template.
    pub fn text(&self) -> &Text {
        match *self {}
    }

    /// Longest sequence in tokens.
    pub fn context(&self) -> usize {
        match *self {}
    }

    /// Log-probabilities of the next token.
    pub fn next_token_logprobs(&self, _: &[u32], _: &[u32], _: &Devices) -> Result<Vec<f32>, String> {
        match *self {}
    }
}
