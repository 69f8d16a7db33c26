//! Loads models, each once.

use std::path::Path;
use std::sync::Arc;

use rehearsal_lm::Checkpoint;

use crate::config::ModelSource;
use crate::embedded;
use crate::error::Result;

/// Models by where they come from: roles that start from the same model share one copy.
#[derive(Default)]
pub struct ModelCache {
    models: Vec<(ModelSource, Arc<Checkpoint>)>,
    /// The date that chat templates print, in days after 1 January 1970.
    day: Option<u32>,
}

impl ModelCache {
    /// An empty cache of models whose chat templates print a date, if they print one.
    pub fn new(day: Option<u32>) -> Self {
        Self { models: Vec::new(), day }
    }

    /// The date that chat templates print.
    pub fn day(&self) -> Option<u32> {
        self.day
    }

    /// The model, loaded if it was not loaded before.
    pub fn load(&mut self, source: &ModelSource) -> Result<Arc<Checkpoint>> {
        if let Some((_, model)) = self.models.iter().find(|(s, _)| s == source) {
            return Ok(model.clone());
        }
        let model = Arc::new(dated(load_model(source)?, self.day));
        self.models.push((source.clone(), model.clone()));
        Ok(model)
    }
}

/// A model whose chat template prints a date, if it prints one.
pub fn dated(mut model: Checkpoint, day: Option<u32>) -> Checkpoint {
    if let Some(day) = day {
        model.text = model.text.with_day(day);
    }
    model
}

/// Loads a model.
pub fn load_model(source: &ModelSource) -> Result<Checkpoint> {
    match source {
        ModelSource::Embedded => Ok(embedded::model()?),
        ModelSource::Path(path) => Ok(Checkpoint::open(Path::new(path))?),
    }
}
