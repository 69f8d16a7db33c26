//! `[placement]`

use rehearsal_actors::Placement;

use crate::config::{Keys, Range, Settings};

/// `[placement]`: roles without a device of their own are on the policy's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PlacementSettings {
    /// Device of the policy; `None` for the CPU.
    pub policy: Option<Placement>,
    /// Device of the reference; `None` for the policy's.
    pub reference: Option<Placement>,
    /// Device of reward models and local judges; `None` for the policy's.
    pub reward: Option<Placement>,
    /// Device of the critic; `None` for the policy's.
    pub critic: Option<Placement>,
    /// CPU threads; 0 for all.
    pub threads: usize,
}

impl PlacementSettings {
    /// Device of the policy.
    pub fn policy(&self) -> Placement {
        self.policy.unwrap_or_default()
    }

    /// Device of the reference.
    pub fn reference(&self) -> Placement {
        self.reference.unwrap_or(self.policy())
    }

    /// Device of reward models and local judges.
    pub fn reward(&self) -> Placement {
        self.reward.unwrap_or(self.policy())
    }

    /// Device of the critic.
    pub fn critic(&self) -> Placement {
        self.critic.unwrap_or(self.policy())
    }
}

impl Settings for PlacementSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("placement");
        let mut place = |key, value: &mut Option<Placement>, help| {
            s.speed().parsed(key, value, "\"cpu\" or \"cuda:N\"", "a device: \"cpu\" or \"cuda:N\"", help);
        };
        place("policy", &mut self.policy, "Device of the policy (default `cpu`).");
        place("reference", &mut self.reference, "Device of the reference (default: that of the policy).");
        place("reward", &mut self.reward, "Device of trained reward models (default: that of the policy).");
        place("critic", &mut self.critic, "Device of the critic (default: that of the policy).");
        let help = "CPU threads; 0 takes one for each core. Changes the speed, no result.";
        s.speed().integer("threads", &mut self.threads, Range::within(0.0, 1024.0), help);
    }
}
