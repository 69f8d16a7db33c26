//! Models as the command line names them: files, the embedded one, or a job's newest checkpoint.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rehearsal_lm::{Checkpoint, Lora, Parameters};
use rehearsal_store::{OwnedTensor, Store};

use super::run::saved_config;
use crate::config::ModelSource;
use crate::config::methods::Algorithm;
use crate::error::{Error, Result};
use crate::inputs::load_model;

/// An error unless a job has worked in the directory: opening a store would make one.
pub fn is_job(directory: &Path) -> Result<()> {
    if directory.join("store").is_dir() { Ok(()) } else { Err(Error::NothingToResume(directory.into())) }
}

/// A model by name; for a job's directory, its policy as of the newest whole checkpoint.
pub fn model(name: &str) -> Result<Checkpoint> {
    let path = Path::new(name);
    if is_job(path).is_ok() {
        let (store, _) = Store::open(path)?;
        return policy(path, &store);
    }
    load_model(&if name == "embedded" { ModelSource::Embedded } else { ModelSource::Path(path.into()) })
}

/// A job's trained model (averaged, where its weights are): its start when there is no checkpoint yet.
pub fn policy(directory: &Path, store: &Store) -> Result<Checkpoint> {
    let config = saved_config(directory)?;
    let mut checkpoint = load_model(&config.model.policy)?;
    // A reward model's job trains a critic.
    let role = if config.job.algorithm == Algorithm::RewardModel { "critic" } else { "policy" };
    if role == "critic" {
        checkpoint = checkpoint.with_score_head(config.job.seed)?;
    }
    let (latest, damaged) = store.latest_checkpoint()?;
    for note in damaged {
        tracing::warn!("{}", note.0);
    }
    if let Some(latest) = latest {
        let averaged = latest.tensors.iter().any(|t| t.name.starts_with(&format!("{role}.average.")));
        let prefix = format!("{role}.{}.", if averaged { "average" } else { "weights" });
        let tensors: Parameters = latest
            .tensors
            .into_iter()
            .filter_map(|t| Some((t.name.strip_prefix(&prefix)?.to_string(), t)))
            .map(|(name, t)| Ok((name, tensor(&t)?)))
            .collect::<Result<_>>()?;
        if let Some(settings) = &config.lora {
            let lora = match &settings.adapter {
                Some(adapter) => Lora::open(&checkpoint, adapter, &Device::Cpu)?,
                None => Lora::new(&checkpoint, settings.config.clone(), &Device::Cpu, config.job.seed)?,
            };
            for (name, var) in lora.variables() {
                let missing = || Error::State(format!("the checkpoint has no `{name}`"));
                var.set(tensors.get(name).ok_or_else(missing)?).map_err(rehearsal_lm::Error::from)?;
            }
            let merged = lora.merged(&checkpoint, &Device::Cpu)?;
            checkpoint.parameters.extend(merged);
        } else {
            checkpoint.parameters = tensors;
        }
    }
    Ok(checkpoint)
}

fn tensor(t: &OwnedTensor) -> Result<Tensor> {
    let dtype = match t.dtype.as_str() {
        "F32" => DType::F32,
        other => return Err(Error::State(format!("`{}` has the type {other}", t.name))),
    };
    Ok(Tensor::from_raw_buffer(&t.data, dtype, &t.shape, &Device::Cpu).map_err(rehearsal_lm::Error::from)?)
}
