//! Files of a Hugging Face model directory: configuration and weights.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A model directory with its parsed `config.json`. Errors name the file, not the directory.
pub(super) struct Directory {
    path: PathBuf,
    pub config: Value,
}

/// Weights on the CPU, converted to f32 as the model takes them.
pub(super) struct Weights {
    pub tensors: VarBuilder<'static>,
    /// First 16 hex digits of the BLAKE3 hash of the weight files.
    pub fingerprint: String,
}

impl Directory {
    /// Reads `config.json`.
    pub fn open(path: &Path) -> Result<Self, String> {
        let wrong = |e: &dyn std::fmt::Display| format!("config.json: {e}");
        let text = std::fs::read_to_string(path.join("config.json")).map_err(|e| wrong(&e))?;
        Ok(Self { path: path.into(), config: serde_json::from_str(&text).map_err(|e| wrong(&e))? })
    }

    /// The architecture's name; empty if `config.json` has none.
    pub fn model_type(&self) -> &str {
        self.config["model_type"].as_str().unwrap_or_default()
    }

    /// `config.json` as the configuration of one architecture.
    pub fn parsed<T: DeserializeOwned>(&self) -> Result<T, String> {
        serde_json::from_value(self.config.clone()).map_err(|e| format!("config.json: {e}"))
    }

    /// Path of a file of the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Content of a file of the directory.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        std::fs::read(self.file(name)).map_err(|e| format!("{name}: {e}"))
    }

    /// All `.safetensors` files by name, the shards of a model; an error if there are none.
    pub fn shards(&self) -> Result<Vec<PathBuf>, String> {
        let entries = std::fs::read_dir(&self.path).map_err(|e| e.to_string())?;
        let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        if files.is_empty() { Err("the directory has no .safetensors file".into()) } else { Ok(files) }
    }
}

impl Weights {
    /// Reads and hashes safetensors files in the order given.
    pub fn read(files: &[PathBuf]) -> Result<Self, String> {
        let mut hasher = blake3::Hasher::new();
        let mut tensors = HashMap::new();
        for path in files {
            let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
            let bytes = std::fs::read(path).map_err(|e| wrong(&e))?;
            hasher.update(&bytes);
            tensors.extend(rehearsal_lm::tensors_of(&bytes, path, &Device::Cpu).map_err(|e| e.to_string())?);
        }
        Ok(Self {
            tensors: VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu),
            fingerprint: fingerprint(&hasher),
        })
    }
}

/// The first 16 hex digits of a hash.
pub(super) fn fingerprint(hasher: &blake3::Hasher) -> String {
    hasher.finalize().to_hex()[..16].to_string()
}
