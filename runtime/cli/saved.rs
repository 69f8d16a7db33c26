//! Models as the command line names them: model files, the embedded model, or the newest checkpoint of a job.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rehearsal_lm::{Checkpoint, Lora, Parameters};
use rehearsal_store::{OwnedTensor, Store};

use super::run::saved_config;
use crate::config::ModelSource;
use crate::config::methods::Algorithm;
use crate::error::{Error, Result};
use crate::inputs::load_model;

/// Fails unless the directory has a store. Checked before opening one, which would create it.
pub fn require_job(directory: &Path) -> Result<()> {
    if directory.join("store").is_dir() { Ok(()) } else { Err(Error::NothingToResume(directory.into())) }
}

/// Opens a model: `embedded`, a model directory or file, or the directory of a job, for the policy of its newest intact
/// checkpoint.
pub fn model(name: &str) -> Result<Checkpoint> {
    let path = Path::new(name);
    if require_job(path).is_ok() {
        let (store, _) = Store::open(path)?;
        return policy(path, &store);
    }
    load_model(&if name == "embedded" { ModelSource::Embedded } else { ModelSource::Path(path.into()) })
}

/// The model that a job trains: the averaged weights if it averages them, and the initial model before the first
/// checkpoint.
pub fn policy(directory: &Path, store: &Store) -> Result<Checkpoint> {
    let config = saved_config(directory)?;
    let mut checkpoint = load_model(&config.model.policy)?;
    // The algorithm `reward_model` trains the role `critic`.
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
                let missing = || Error::State(format!("the checkpoint has no tensor `{name}`"));
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

/// An f32 tensor of a checkpoint.
fn tensor(t: &OwnedTensor) -> Result<Tensor> {
    let dtype = match t.dtype.as_str() {
        "F32" => DType::F32,
        other => return Err(Error::State(format!("the tensor `{}` has type {other}, not F32", t.name))),
    };
    Ok(Tensor::from_raw_buffer(&t.data, dtype, &t.shape, &Device::Cpu).map_err(rehearsal_lm::Error::from)?)
}
