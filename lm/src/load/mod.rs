//! Loads and saves models: Hugging Face directories, GGUF files, and files held in memory.

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
use crate::random::Stream;
use crate::text::Text;

/// Stream of random numbers of new score heads.
const SCORE_STREAM: u64 = (1 << 63) + (1 << 62);

/// A model as loaded from its files: weights on the CPU in f32, tokenizer and chat template.
pub struct Checkpoint {
    pub architecture: Architecture,
    /// `config.json` as it was read, so that an export keeps the keys that this crate does not know.
    pub config: Value,
    pub parameters: Parameters,
    pub text: Text,
}

/// Contents of the files of a Hugging Face directory.
#[derive(Debug, Clone, Copy)]
pub struct Files<'a> {
    /// `config.json`.
    pub config: &'a [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub tokenizer_config: &'a [u8],
    /// `model.safetensors`.
    pub weights: &'a [u8],
}

impl Checkpoint {
    /// Loads a Hugging Face directory or a `.gguf` file.
    ///
    /// Fails if a file cannot be read, if the architecture is not supported, or if tensors are missing, unknown or of
    /// another shape.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            hf::open(path)
        } else if path.extension().is_some_and(|e| e == "gguf") {
            gguf::open(path)
        } else {
            Err(Error::NotAModel { path: path.into() })
        }
    }

    /// Loads a model from memory; `name` takes the place of the path in errors.
    pub fn from_files(files: Files<'_>, name: &str) -> Result<Self> {
        hf::from_files(files, Path::new(name))
    }

    /// Creates the model on a device for inference, its weights converted to `dtype`.
    pub fn frozen(&self, device: &Device, dtype: DType) -> Result<Decoder> {
        Decoder::frozen(self.architecture.clone(), self.placed(device, dtype)?)
    }

    /// Creates the model on a device for training, its weights converted to `dtype`.
    pub fn trainable(&self, device: &Device, dtype: DType) -> Result<Decoder> {
        Decoder::trainable(self.architecture.clone(), self.placed(device, dtype)?)
    }

    /// Replaces the language-model head with a score head, drawn with `seed` from a normal distribution of standard
    /// deviation `1/√(hidden + 1)` (N+ implementation details). A model that has a score head keeps it.
    pub fn with_score_head(mut self, seed: u64) -> Result<Self> {
        if self.architecture.head == HeadKind::Score {
            return Ok(self);
        }
        let width = self.architecture.hidden;
        let (stream, std) = (Stream::new(seed, SCORE_STREAM), 1.0 / ((width + 1) as f64).sqrt());
        let score: Vec<f32> = (0..width as u64).map(|i| (std * stream.normal(i)) as f32).collect();
        self.parameters.remove("lm_head.weight");
        self.parameters.insert("score.weight".into(), Tensor::from_vec(score, (1, width), &Device::Cpu)?);
        self.config = with_head(&self.config, HeadKind::Score);
        if let (Some(map), Some(pad)) = (self.config.as_object_mut(), self.architecture.pad) {
            // transformers reads the score at the last token that is not padding, so the config must name the padding
            // token.
            map.insert("pad_token_id".into(), pad.into());
        }
        self.architecture = self.architecture.with_head(HeadKind::Score);
        Ok(self)
    }

    /// The same model with its weights converted to another type.
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

    /// Hash of the weights and the tokenizer in 16 hexadecimal digits, independent of where the files are.
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

    /// Writes a Hugging Face directory with `parameters`, converted to `dtype`, instead of the checkpoint's own.
    pub fn save(&self, parameters: &Parameters, directory: &Path, dtype: DType) -> Result<()> {
        save::save(self, parameters, directory, dtype, save::SHARD_BYTES)
    }
}

/// Checks that `parameters` are those that the architecture needs, and drops redundant ones.
fn check(architecture: &Architecture, parameters: Parameters, path: &Path) -> Result<Parameters> {
    // The original GPT-2 files lack the prefix `transformer.`.
    let unprefixed = architecture.model_type == "gpt2" && !parameters.keys().any(|n| n.starts_with("transformer."));
    let prefixed =
        |name: String| if unprefixed && name != "score.weight" { format!("transformer.{name}") } else { name };
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
        derived || (architecture.tied && name.ends_with("lm_head.weight"))
    };
    match parameters.into_keys().find(|name| !redundant(name)) {
        Some(name) => Err(Error::ExtraTensor { name, path: path.into(), model_type: architecture.model_type.clone() }),
        None => Ok(checked),
    }
}
