//! `[job]` and `[checkpoint]`.

use std::path::PathBuf;

use rehearsal_store::Keep;

use crate::config::{Keys, Range, Settings};

/// `[job]`, without its algorithm.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSettings {
    /// Where everything the job makes is kept.
    pub directory: PathBuf,
    /// Optimizer steps.
    pub steps: u64,
    /// Seed of everything random.
    pub seed: u64,
}

impl Default for JobSettings {
    fn default() -> Self {
        Self { directory: PathBuf::new(), steps: 100, seed: 0 }
    }
}

impl Settings for JobSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("job");
        s.needed_path("directory", &mut self.directory, "Where checkpoints, ledger and history are kept.");
        let help = "Optimizer steps of the whole job. May grow on resume.";
        s.speed().integer("steps", &mut self.steps, Range::from(1.0), help);
        let help = "Seed of everything random: order of prompts, sampled tokens.";
        s.integer("seed", &mut self.seed, Range::from(0.0), help);
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CheckpointSettings {
    /// Steps between two checkpoints; 1 or more. With `overhead`, the most.
    pub every_steps: u64,
    /// Share of the job's time that checkpoints may take, which chooses the steps between them; 0 leaves that to
    /// `every_steps`.
    pub overhead: f64,
    /// Checkpoints to keep; older ones are deleted.
    pub keep: usize,
    /// Checkpoints of steps that this divides are kept for good; 0 for none.
    pub keep_every: u64,
}

impl CheckpointSettings {
    /// Which checkpoints stay when one is saved.
    pub(crate) fn kept(&self) -> Keep {
        Keep { newest: self.keep, every: self.keep_every }
    }
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self { every_steps: 50, overhead: 0.0, keep: 2, keep_every: 0 }
    }
}

impl Settings for CheckpointSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("checkpoint");
        let help = "Steps between checkpoints. One is also made at the end and when the job is asked to stop.";
        s.speed().integer("every_steps", &mut self.every_steps, Range::from(1.0), help);
        let help = "Share of the time that checkpoints may take: from what it measures, the job chooses the steps between two, \
                    `every_steps` at most. 0: `every_steps` decides. Results do not depend on it.";
        s.speed().number("overhead", &mut self.overhead, Range::within(0.0, 1.0), help);
        s.speed().integer("keep", &mut self.keep, Range::within(1.0, 1000.0), "Checkpoints kept: the newest.");
        let help = "Checkpoints of steps that this divides are kept for good; 0 for none.";
        s.speed().integer("keep_every", &mut self.keep_every, Range::from(0.0), help);
    }
}
