//! Models as the command line names them: model files, the embedded model, or the newest checkpoint of a job.

use std::path::Path;

use rehearsal_actors::{Placement, Restored};
use rehearsal_lm::Checkpoint;
use rehearsal_store::Store;

use super::run::saved_config;
use crate::config::ModelSource;
use crate::error::{Error, Result};
use crate::models::load_model;

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
    let mut checkpoint = load_model(&config.common.model.policy())?;
    // The algorithm `reward_model` trains the role `critic`.
    let role = if config.algorithm.trains_reward_model() { "critic" } else { "policy" };
    if role == "critic" {
        checkpoint = checkpoint.with_score_head(config.common.job.seed)?;
    }
    let (latest, damaged) = Restored::latest(store)?;
    for note in damaged {
        tracing::warn!("{}", note.0);
    }
    if let Some(latest) = latest {
        let missing = || Error::State(format!("the checkpoint has no {role}"));
        let model = latest.models.get(role).ok_or_else(missing)?;
        model.apply_to(&mut checkpoint, config.common.trained(Placement::Cpu).lora.as_ref())?;
    }
    Ok(checkpoint)
}
