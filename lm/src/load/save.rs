//! Writes a Hugging Face directory.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::Parameters;

/// Most bytes of tensors in one weight file; more are split into shards.
const SHARD_BYTES: usize = 5_000_000_000;

impl Checkpoint {
    /// Writes a Hugging Face directory with `parameters`, converted to `dtype`, instead of the checkpoint's own.
    pub fn save(&self, parameters: &Parameters, directory: &Path, dtype: DType) -> Result<()> {
        save(self, parameters, directory, dtype, SHARD_BYTES)
    }
}

fn save(
    source: &Checkpoint,
    parameters: &Parameters,
    directory: &Path,
    dtype: DType,
    shard_bytes: usize,
) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        let path = directory.join(name);
        fs::write(&path, bytes).map_err(|source| Error::Write { path, source })
    };
    let pretty = |value: &Value| serde_json::to_vec_pretty(value).expect("JSON values serialise");
    fs::create_dir_all(directory).map_err(|source| Error::Write { path: directory.into(), source })?;

    let mut config = source.config.clone();
    for key in ["torch_dtype", "dtype"] {
        if config.get(key).is_some() {
            config[key] = json!(dtype_name(dtype));
        }
    }
    write("config.json", &pretty(&config))?;
    let architecture = &source.architecture;
    write(
        "generation_config.json",
        &pretty(&json!({
            "bos_token_id": architecture.bos, "eos_token_id": architecture.eos, "pad_token_id": architecture.pad,
        })),
    )?;
    write("tokenizer.json", source.text.tokenizer_json().as_bytes())?;
    write("tokenizer_config.json", &pretty(source.text.config()))?;

    let shards = shards(parameters, dtype, shard_bytes)?;
    let many = shards.len() > 1;
    let mut map = BTreeMap::new();
    let mut total = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = if many {
            format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len())
        } else {
            "model.safetensors".to_string()
        };
        for (parameter, tensor) in shard {
            total += tensor.elem_count() * dtype.size_in_bytes();
            map.insert(parameter.clone(), name.clone());
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let path = directory.join(&name);
        safetensors::serialize_to_file(shard.iter().map(|(n, t)| (n, t)), Some(metadata), &path)
            .map_err(|e| Error::Malformed { path, reason: e.to_string() })?;
    }
    if many {
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        write("model.safetensors.index.json", &pretty(&index))?;
    }
    Ok(())
}

fn shards(parameters: &Parameters, dtype: DType, shard_bytes: usize) -> Result<Vec<Vec<(String, Tensor)>>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for (name, tensor) in parameters {
        let bytes = tensor.elem_count() * dtype.size_in_bytes();
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        let tensor = tensor.to_device(&candle_core::Device::Cpu)?.to_dtype(dtype)?.contiguous()?;
        shards.last_mut().expect("at least one shard").push((name.clone(), tensor));
    }
    Ok(shards)
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_saved_model_reads_back_whole_or_sharded() {
        let checkpoint = testing::checkpoint();
        for limit in [SHARD_BYTES, 4000] {
            let directory = tempfile::tempdir().unwrap();
            save(&checkpoint, &checkpoint.parameters, directory.path(), DType::F32, limit).unwrap();
            assert_eq!(directory.path().join("model.safetensors.index.json").exists(), limit < SHARD_BYTES);
            let read = Checkpoint::open(directory.path()).unwrap();
            assert_eq!(read.architecture, checkpoint.architecture);
            for (name, tensor) in &checkpoint.parameters {
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(flat(&read.parameters[name]), flat(tensor), "{name}");
            }
            assert_eq!(read.text.encode("ab ba").unwrap(), checkpoint.text.encode("ab ba").unwrap());
        }
    }

    #[test]
    fn half_precision_reads_back_as_rounded() {
        let checkpoint = testing::checkpoint();
        let directory = tempfile::tempdir().unwrap();
        save(&checkpoint, &checkpoint.parameters, directory.path(), DType::BF16, SHARD_BYTES).unwrap();
        let read = Checkpoint::open(directory.path()).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (name, tensor) in &checkpoint.parameters {
            for (a, b) in flat(&read.parameters[name]).iter().zip(flat(tensor)) {
                assert!((a - b).abs() <= b.abs() / 256.0, "{name}: {a} {b}");
            }
        }
    }

    #[test]
    fn a_missing_extra_or_misshapen_tensor_is_named() {
        let checkpoint = testing::checkpoint();
        let broken = |change: &dyn Fn(&mut Parameters)| {
            let directory = tempfile::tempdir().unwrap();
            let mut parameters = checkpoint.parameters.clone();
            change(&mut parameters);
            save(&checkpoint, &parameters, directory.path(), DType::F32, SHARD_BYTES).unwrap();
            Checkpoint::open(directory.path()).err().expect("an error").to_string()
        };
        let norm = "model.norm.weight";
        let error = broken(&|p| drop(p.remove(norm)));
        assert!(error.contains(norm) && error.contains("missing"), "{error}");
        let error = broken(&|p| drop(p.insert("model.extra".into(), p[norm].clone())));
        assert!(error.contains("model.extra"), "{error}");
        let error = broken(&|p| drop(p.insert(norm.into(), p[norm].narrow(0, 0, 3).unwrap())));
        assert!(error.contains(norm) && error.contains("[3]"), "{error}");
    }

    #[test]
    fn a_truncated_file_is_named() {
        let checkpoint = testing::checkpoint();
        let directory = tempfile::tempdir().unwrap();
        save(&checkpoint, &checkpoint.parameters, directory.path(), DType::F32, SHARD_BYTES).unwrap();
        let path = directory.path().join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = Checkpoint::open(directory.path()).err().expect("an error").to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}
