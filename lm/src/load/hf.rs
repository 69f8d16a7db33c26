//! Hugging Face directories: `config.json`, `*.safetensors` (one file or sharded), `tokenizer.json`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::Value;

use super::check::check;
use super::checkpoint::{Checkpoint, Files};
use super::file::read;
use super::tensors::tensors_of;
use crate::error::{Error, Result};
use crate::model::{Architecture, Parameters};
use crate::text::Text;

pub fn open(directory: &Path) -> Result<Checkpoint> {
    let config_path = directory.join("config.json");
    if !config_path.exists() {
        return Err(Error::NotAModel { path: directory.into() });
    }
    let config = json(&read(&config_path)?, &config_path)?;
    let mut parameters = Parameters::new();
    for path in weight_files(directory)? {
        parameters.extend(tensors(&read(&path)?, &path)?);
    }
    let optional = |name: &str| {
        let path = directory.join(name);
        if path.exists() { read(&path).map(Some) } else { Ok(None) }
    };
    let text = Text::from_json(
        &read(&directory.join("tokenizer.json"))?,
        optional("tokenizer_config.json")?.as_deref(),
        // Newer exports have the template in a file of its own.
        optional("chat_template.jinja")?.map(|t| String::from_utf8_lossy(&t).into_owned()),
    )?;
    assemble(config, optional("generation_config.json")?, parameters, text, directory)
}

pub fn from_files(files: Files<'_>, name: &Path) -> Result<Checkpoint> {
    let text = Text::from_json(files.tokenizer, Some(files.tokenizer_config), None)?;
    assemble(json(files.config, name)?, None, tensors(files.weights, name)?, text, name)
}

fn assemble(
    config: Value,
    generation: Option<Vec<u8>>,
    parameters: Parameters,
    text: Text,
    path: &Path,
) -> Result<Checkpoint> {
    let mut architecture = Architecture::from_json(&config)?;
    // generation_config.json lists every end-of-sequence token; config.json often only one.
    if let Some(eos) =
        generation.and_then(|g| serde_json::from_slice::<Value>(&g).ok()).map(|g| g["eos_token_id"].clone())
    {
        let more: Vec<u32> = match eos {
            Value::Array(many) => many.iter().filter_map(Value::as_u64).map(|t| t as u32).collect(),
            one => one.as_u64().map(|t| t as u32).into_iter().collect(),
        };
        if !more.is_empty() {
            architecture.eos = more;
        }
    }
    let parameters = check(&architecture, parameters, path)?;
    Ok(Checkpoint { architecture, config, parameters, text })
}

/// The safetensors files of a directory: the shards that the index names, or `model.safetensors`.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let index_path = directory.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(vec![directory.join("model.safetensors")]);
    }
    let index = json(&read(&index_path)?, &index_path)?;
    let map = index["weight_map"]
        .as_object()
        .ok_or_else(|| Error::Malformed { path: index_path.clone(), reason: "no `weight_map` object".into() })?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

fn tensors(bytes: &[u8], path: &Path) -> Result<Parameters> {
    let malformed = |e: candle_core::Error| Error::Malformed { path: path.into(), reason: e.to_string() };
    tensors_of(bytes, path, &Device::Cpu)?
        .into_iter()
        .map(|(name, t)| Ok((name, t.to_dtype(DType::F32).map_err(malformed)?)))
        .collect()
}

fn json(bytes: &[u8], path: &Path) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|e| Error::Malformed { path: path.into(), reason: e.to_string() })
}
