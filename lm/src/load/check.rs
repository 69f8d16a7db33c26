//! Checks that a file's weights are those of its architecture.

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::{Architecture, LANGUAGE_HEAD, Parameters, SCORE_HEAD};

/// Checks that `parameters` are those that the architecture needs, and drops redundant ones.
pub fn check(architecture: &Architecture, parameters: Parameters, path: &Path) -> Result<Parameters> {
    // The original GPT-2 files lack the prefix `transformer.`.
    let unprefixed = architecture.model_type == "gpt2" && !parameters.keys().any(|n| n.starts_with("transformer."));
    let prefixed = |name: String| if unprefixed && name != SCORE_HEAD { format!("transformer.{name}") } else { name };
    let mut parameters: Parameters = parameters.into_iter().map(|(name, t)| (prefixed(name), t)).collect();
    let mut checked = Parameters::new();
    for (name, wanted) in architecture.parameters() {
        let Some(tensor) = parameters.remove(&name) else {
            return Err(Error::MissingTensor { name, path: path.into(), wanted });
        };
        if tensor.dims() != wanted {
            return Err(Error::Misshapen { name, path: path.into(), found: tensor.dims().to_vec(), wanted });
        }
        checked.insert(name, tensor);
    }
    // Tables that old exports contain and that follow from the config, and the copy of a tied head, are redundant.
    let redundant = |name: &str| {
        let derived = ["rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"].iter().any(|end| name.ends_with(end));
        derived || (architecture.tied && name.ends_with(LANGUAGE_HEAD))
    };
    match parameters.into_keys().find(|name| !redundant(name)) {
        Some(name) => Err(Error::ExtraTensor { name, path: path.into(), model_type: architecture.model_type.clone() }),
        None => Ok(checked),
    }
}
