//! Models in and out: Hugging Face directories, GGUF files, and files held in memory.

mod gguf;
mod gguf_tokenizer;
mod hf;
mod save;

pub use gguf::GgufText;

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::{Architecture, Decoder, HeadKind, Parameters, with_head};
use crate::random::{Region, Stream};
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

    /// The same trunk with a score head in the place of its own: drawn by `seed` from a normal distribution of standard
    /// deviation `1/√(width + 1)` (N+ implementation details), or kept if it has one.
    pub fn with_score_head(mut self, seed: u64) -> Result<Self> {
        if self.architecture.head == HeadKind::Score {
            return Ok(self);
        }
        let width = self.architecture.hidden;
        let stream = Stream::in_region(seed, Region::ScoreHeadInit, 0);
        let std = 1.0 / ((width + 1) as f64).sqrt();
        let score: Vec<f32> = (0..width as u64).map(|i| (std * stream.normal(i)) as f32).collect();
        self.parameters.remove("lm_head.weight");
        self.parameters.insert("score.weight".into(), Tensor::from_vec(score, (1, width), &Device::Cpu)?);
        self.config = with_head(&self.config, HeadKind::Score);
        if let (Some(map), Some(pad)) = (self.config.as_object_mut(), self.architecture.pad) {
            // transformers reads the score at the last token that is no padding, so the config must name it.
            map.insert("pad_token_id".into(), pad.into());
        }
        self.architecture = self.architecture.with_head(HeadKind::Score);
        Ok(self)
    }

    /// The same model with its weights rounded to another type.
    pub fn rounded(&self, dtype: DType) -> Result<Self> {
        let rounded = |(name, t): (&String, &Tensor)| Ok((name.clone(), t.to_dtype(dtype)?));
        Ok(Self {
            architecture: self.architecture.clone(),
            config: self.config.clone(),
            parameters: self.parameters.iter().map(rounded).collect::<Result<_>>()?,
            text: self.text.clone(),
        })
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
fn check(architecture: &Architecture, parameters: Parameters, path: &Path) -> Result<Parameters> {
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
