//! `[evaluation]`

use crate::config::{Keys, Range, Settings};

/// `[evaluation]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvaluationSettings {
    /// 0: never.
    pub every_steps: u64,
    /// Held-out prompts of an evaluation.
    pub prompts: usize,
    /// Samples kept with each evaluation.
    pub samples: usize,
}

impl Default for EvaluationSettings {
    fn default() -> Self {
        Self { every_steps: 0, prompts: 32, samples: 3 }
    }
}

impl Settings for EvaluationSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("evaluation");
        s.integer(
            "every_steps",
            &mut self.every_steps,
            Range::from(0.0),
            "Evaluate on the held-out prompts or rows at the start, every so many steps, and at the end; 0 never.",
        );
        s.integer("prompts", &mut self.prompts, Range::from(1.0), "Held-out prompts at most.");
        s.integer("samples", &mut self.samples, Range::within(0.0, 100.0), "Completions kept with each evaluation.");
    }
}
