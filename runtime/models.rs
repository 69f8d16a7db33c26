//! Loads models, each once.

use std::path::Path;
use std::sync::Arc;

use rehearsal_lm::Checkpoint;

use crate::config::ModelSource;
use crate::embedded;
use crate::error::Result;

/// Models by where they come from: roles that start from the same model share one copy.
#[derive(Default)]
pub struct ModelCache(Vec<(ModelSource, Arc<Checkpoint>)>);

impl ModelCache {
    /// The model, loaded if it was not loaded before.
    pub fn load(&mut self, source: &ModelSource) -> Result<Arc<Checkpoint>> {
        if let Some((_, model)) = self.0.iter().find(|(s, _)| s == source) {
            return Ok(model.clone());
        }
        let model = Arc::new(load_model(source)?);
        self.0.push((source.clone(), model.clone()));
        Ok(model)
    }
}

/// Loads a model.
pub fn load_model(source: &ModelSource) -> Result<Checkpoint> {
    match source {
        ModelSource::Embedded => Ok(embedded::model()?),
        ModelSource::Path(path) => Ok(Checkpoint::open(Path::new(path))?),
    }
}
