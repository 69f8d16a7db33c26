//! What a model's files say, for another process.

use candle_core::Device;
use rehearsal_lm::{Architecture, Checkpoint, Parameters, Text};
use serde::{Deserialize, Serialize};

use crate::snapshot::{stored_dtype, tensor_of, with_bytes};
use crate::{Error, ModelSnapshot, Result};

/// What the files of a model say beside its weights.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelFiles {
    /// `config.json`.
    pub config: String,
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`.
    pub tokenizer_config: String,
}

impl ModelFiles {
    /// The files of a model.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        Self {
            config: checkpoint.config.to_string(),
            tokenizer: checkpoint.text.tokenizer_json().into(),
            tokenizer_config: checkpoint.text.config().to_string(),
        }
    }

    /// The model, with these weights.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] or [`Error::Model`] if a file is not of a model.
    pub fn checkpoint(&self, parameters: Parameters) -> Result<Checkpoint> {
        let config: serde_json::Value = serde_json::from_str(&self.config)
            .map_err(|e| Error::Data(format!("a model's `config.json` cannot be read: {e}")))?;
        Ok(Checkpoint {
            architecture: Architecture::from_json(&config)?,
            config,
            parameters,
            text: Text::from_json(self.tokenizer.as_bytes(), Some(self.tokenizer_config.as_bytes()), None)?,
        })
    }
}

/// A tensor's name, type and shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// Its name.
    pub name: String,
    /// Its type, as safetensors names it.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl Described {
    /// The tensor of these bytes, on the CPU.
    pub(crate) fn tensor(&self, bytes: &[u8]) -> Result<candle_core::Tensor> {
        tensor_of(&self.name, &self.dtype, &self.shape, bytes)
    }
}

/// Describes a tensor, and copies its bytes.
pub(crate) fn described(name: &str, tensor: &candle_core::Tensor) -> Result<(Described, Vec<u8>)> {
    let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
    let (dtype, shape) = (stored_dtype(name, tensor.dtype())?.to_string(), tensor.dims().to_vec());
    Ok((Described { name: name.into(), dtype, shape }, with_bytes(name, &tensor, <[u8]>::to_vec)?))
}

impl ModelSnapshot {
    /// Descriptions of the tensors, and their bytes (little-endian, row by row).
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if a tensor has a type that snapshots do not have.
    pub fn parts(&self) -> Result<Vec<(Described, Vec<u8>)>> {
        self.tensors.iter().map(|(name, tensor)| described(name, tensor)).collect()
    }

    /// A snapshot of weights from [`ModelSnapshot::parts`].
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if a type is unknown, [`Error::Tensor`] if the bytes are not those of the shape.
    pub fn from_parts(version: u64, parts: impl IntoIterator<Item = (Described, Vec<u8>)>) -> Result<Self> {
        let one = |(described, bytes): (Described, Vec<u8>)| {
            let tensor = described.tensor(&bytes)?;
            Ok((described.name, tensor))
        };
        let tensors = parts.into_iter().map(one).collect::<Result<_>>()?;
        Ok(Self { version, optimizer_steps: 0, tensors })
    }
}
