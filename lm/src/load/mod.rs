//! Models in and out: Hugging Face directories, GGUF files, and files held in memory.

mod gguf;
mod gguf_tokenizer;
mod hf;
mod save;

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::{Architecture, Decoder, Parameters};
use crate::text::Text;

/// A model as its files describe it: weights on the CPU in f32, tokenizer and chat template.
pub struct Checkpoint {
    pub architecture: Architecture,
    /// `config.json` as it was read, so that an export keeps what this program does not know.
    pub config: Value,
    pub parameters: Parameters,
    pub text: Text,
}

/// The files of a model held in memory.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    pub config: &'a [u8],
    pub tokenizer: &'a [u8],
    pub tokenizer_config: &'a [u8],
    pub weights: &'a [u8],
}

impl Checkpoint {
    /// Reads a Hugging Face directory or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            hf::open(path)
        } else if path.extension().is_some_and(|e| e == "gguf") {
            gguf::open(path)
        } else {
            Err(Error::NotAModel { path: path.into() })
        }
    }

    /// Reads a model from memory; `name` stands for the path in errors.
    pub fn from_files(files: Files<'_>, name: &str) -> Result<Self> {
        hf::from_files(files, Path::new(name))
    }

    /// The model on a device, for inference.
    pub fn frozen(&self, device: &Device, dtype: DType) -> Result<Decoder> {
        Decoder::frozen(self.architecture.clone(), self.placed(device, dtype)?)
    }

    /// The model on a device, to be trained.
    pub fn trainable(&self, device: &Device, dtype: DType) -> Result<Decoder> {
        Decoder::trainable(self.architecture.clone(), self.placed(device, dtype)?)
    }

    /// The same checkpoint with its weights rounded to another type.
    pub fn with_dtype(mut self, dtype: DType) -> Result<Self> {
        for tensor in self.parameters.values_mut() {
            *tensor = tensor.to_dtype(dtype)?;
        }
        Ok(self)
    }

    fn placed(&self, device: &Device, dtype: DType) -> Result<Parameters> {
        self.parameters.iter().map(|(name, t)| Ok((name.clone(), t.to_dtype(dtype)?.to_device(device)?))).collect()
    }

    /// A hash of the weights and the tokenizer: equal for equal models, wherever their files lie.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.text.tokenizer_json().as_bytes()).update(self.text.config().to_string().as_bytes());
        for (name, tensor) in &self.parameters {
            hasher.update(name.as_bytes());
            crate::ops::with_floats(&tensor.contiguous()?, |data| {
                hasher.update(bytemuck::cast_slice(data));
                Ok(())
            })?;
        }
        Ok(hasher.finalize().to_hex()[..16].to_string())
    }

    /// Writes a Hugging Face directory with `parameters` (by name) in the place of this checkpoint's own.
    pub fn save(&self, parameters: &Parameters, directory: &Path, dtype: DType) -> Result<()> {
        save::save(self, parameters, directory, dtype, save::SHARD_BYTES)
    }
}

/// Checks that `parameters` are exactly what the architecture needs.
fn check(architecture: &Architecture, mut parameters: Parameters, path: &Path) -> Result<Parameters> {
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
    let harmless =
        |name: &str| name.ends_with("rotary_emb.inv_freq") || (architecture.tied && name == "lm_head.weight");
    match parameters.into_keys().find(|name| !harmless(name)) {
        Some(name) => Err(Error::ExtraTensor { name, path: path.into(), model_type: architecture.model_type.clone() }),
        None => Ok(checked),
    }
}
