//! A model as its files describe it.

use candle_core::{DType, Device, Tensor};
use rehearsal_kernels::random::{Region, Stream};
use serde_json::Value;

use crate::error::Result;
use crate::model::{Architecture, Decoder, HeadKind, LANGUAGE_HEAD, Parameters, SCORE_HEAD, with_head};
use crate::text::Text;

/// A model as loaded from its files: weights on the CPU in f32, tokenizer and chat template.
#[derive(Clone)]
pub struct Checkpoint {
    /// Sizes and features.
    pub architecture: Architecture,
    /// `config.json` as it was read, so that an export keeps the keys that this crate does not know.
    pub config: Value,
    /// Weights by their Hugging Face names.
    pub parameters: Parameters,
    /// Tokenizer and chat template.
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
        let stream = Stream::in_region(seed, Region::ScoreHeadInit, 0);
        let std = 1.0 / ((width + 1) as f64).sqrt();
        let score: Vec<f32> = (0..width as u64).map(|i| (std * stream.normal(i)) as f32).collect();
        self.parameters.remove(LANGUAGE_HEAD);
        self.parameters.insert(SCORE_HEAD.into(), Tensor::from_vec(score, (1, width), &Device::Cpu)?);
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
}
