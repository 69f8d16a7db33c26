//! What offline algorithms share: their sections and the drawing of rows.

use crate::config::{Keys, Settings};
use crate::data::{DataSettings, PromptsSettings, Rows};
use crate::driver::{Run, Stats, Step, Updates};
use crate::error::Result;
use crate::summary::Seconds;

/// Sections of an algorithm that learns from rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OfflineSettings {
    /// Rows that are learned from: `[data]`.
    pub data: DataSettings,
    /// How prompts become tokens: chat template and system message.
    pub prompts: PromptsSettings,
}

impl Settings for OfflineSettings {
    fn visit(&mut self, keys: &mut Keys) {
        self.data.visit(keys);
        self.prompts.visit(keys);
    }
}

impl OfflineSettings {
    /// Reports missing data.
    pub fn check(&self, keys: &mut Keys, algorithm: &str) {
        if self.data.train.is_empty() {
            keys.section("data").problem("train", format!("is missing; `{algorithm}` learns from rows"));
        }
    }

    /// The rows of the current step, with their places in the data.
    pub fn draw<'r, T>(&self, run: &Run, rows: &'r Rows<T>) -> Vec<(usize, &'r T)> {
        rows.draw(run.common.job.seed, run.state.cursor, self.data.batch_size)
    }

    /// A step of one update on rows.
    pub fn step(&self, run: &Run, updates: Updates, stats: Stats, seconds: Seconds) -> Result<Step> {
        let summary = updates.summary(stats, seconds, run.learning_rate(), 0);
        Ok(Step { summary, drawn: self.data.batch_size, completions: 0 })
    }
}
