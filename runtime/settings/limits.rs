//! `[limits]`

use std::time::Duration;

use crate::config::{Keys, Range, Settings};

/// `[limits]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LimitsSettings {
    /// A role replies within this time, or the request fails.
    pub request: Duration,
    /// A wait of this length is told.
    pub notice: Duration,
    /// Restarts of each role, at most; one more death ends the job.
    pub restarts_max: u32,
    /// Completions that the buffer holds, at most.
    pub rollouts_max: usize,
    /// Optimizer updates between a completion's policy and the one that learns from it, at most.
    pub staleness_max: u64,
    /// Tokens of a step, at most, whose activations generation records for the update.
    pub kept_tokens: usize,
}

impl Default for LimitsSettings {
    fn default() -> Self {
        Self {
            request: Duration::from_secs(3600),
            notice: Duration::from_secs(60),
            restarts_max: 3,
            rollouts_max: 65_536,
            staleness_max: 0,
            kept_tokens: 4096,
        }
    }
}

impl Settings for LimitsSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("limits");
        let help = "A role replies within this time, or the request fails.";
        s.speed().seconds("request_seconds", &mut self.request, Range::from(1.0), help);
        let help = "A wait of this length is told: by an event, the status and the log of the program.";
        s.speed().seconds("notice_seconds", &mut self.notice, Range::from(1.0), help);
        let help = "Times a role that died is started again.";
        s.speed().integer("restarts_max", &mut self.restarts_max, Range::within(0.0, 1000.0), help);
        let help = "Completions the rollout buffer holds at most.";
        s.speed().integer("rollouts_max", &mut self.rollouts_max, Range::from(1.0), help);
        let help = "Optimizer updates between a completion's policy and the one that learns from it, at most.";
        s.speed().integer("staleness_max", &mut self.staleness_max, Range::from(0.0), help);
        s.speed().integer(
            "kept_tokens",
            &mut self.kept_tokens,
            Range::from(0.0),
            "Activations of a step's tokens are recorded during generation, so that the update on them needs no forward pass. A \
             step of more tokens than this, or than `optimizer.micro_batch_tokens`, computes them twice, as does everything on \
             a GPU. Memory against speed: changes no result.",
        );
    }
}
