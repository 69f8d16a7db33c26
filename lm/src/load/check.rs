//! Checks that a file's weights are those of its architecture.

use std::path::Path;

use crate::error::{Error, Result};
use crate::model::{Architecture, Parameters};

/// Checks that `parameters` are exactly what the architecture needs.
pub fn check(architecture: &Architecture, parameters: Parameters, path: &Path) -> Result<Parameters> {
    // The first GPT-2 files have the trunk without its prefix.
    let bare = architecture.model_type == "gpt2" && !parameters.keys().any(|n| n.starts_with("transformer."));
    let whole = |name: String| if bare && name != "score.weight" { format!("transformer.{name}") } else { name };
    let mut parameters: Parameters = parameters.into_iter().map(|(name, t)| (whole(name), t)).collect();
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
    // Derived tables that old exports carry, and a head that repeats the embedding, hold nothing of their own.
    let harmless = |name: &str| {
        let derived = ["rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"].iter().any(|end| name.ends_with(end));
        derived || (architecture.tied && name.ends_with("lm_head.weight"))
    };
    match parameters.into_keys().find(|name| !harmless(name)) {
        Some(name) => Err(Error::ExtraTensor { name, path: path.into(), model_type: architecture.model_type.clone() }),
        None => Ok(checked),
    }
}
