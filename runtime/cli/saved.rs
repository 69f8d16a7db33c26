//! Models as the command line names them: files, the embedded one, or a job's newest checkpoint.

use std::path::Path;

use rehearsal_actors::{Placement, Restored};
use rehearsal_lm::Checkpoint;
use rehearsal_store::Store;

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
    let (latest, damaged) = Restored::latest(store)?;
    for note in damaged {
        tracing::warn!("{}", note.0);
    }
    if let Some(latest) = latest {
        let missing = || Error::State(format!("the checkpoint has no {role}"));
        let model = latest.models.get(role).ok_or_else(missing)?;
        model.apply_to(&mut checkpoint, config.trained(Placement::Cpu).lora.as_ref())?;
    }
    Ok(checkpoint)
}
