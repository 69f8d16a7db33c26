//! `[placement]`

use rehearsal_actors::Placement;

use crate::config::{Keys, Range, Settings};

/// `[placement]`: roles without a device of their own are on the policy's, or on its first one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PlacementSettings {
    /// Devices of the policy's members; none for one member on the CPU.
    pub policy: Vec<Placement>,
    /// Device of the reference; `None` for the policy's.
    pub reference: Option<Placement>,
    /// Device of reward models and local judges; `None` for the policy's.
    pub reward: Option<Placement>,
    /// Devices of the critic's members; none for the policy's.
    pub critic: Vec<Placement>,
    /// Device of the sampler, where generation runs ahead of learning; `None` for the policy's.
    pub sampler: Option<Placement>,
    /// CPU threads of the sampler's own; 0 for none.
    pub sampler_threads: usize,
    /// CPU threads; 0 for all.
    pub threads: usize,
}

impl PlacementSettings {
    /// Devices of the policy's members, one or more.
    pub fn policy_members(&self) -> Vec<Placement> {
        if self.policy.is_empty() { vec![Placement::Cpu] } else { self.policy.clone() }
    }

    /// Devices of the critic's members, one or more.
    pub fn critic_members(&self) -> Vec<Placement> {
        if self.critic.is_empty() { self.policy_members() } else { self.critic.clone() }
    }

    /// The policy's first device.
    pub fn policy(&self) -> Placement {
        self.policy.first().copied().unwrap_or_default()
    }

    /// Device of the reference.
    pub fn reference(&self) -> Placement {
        self.reference.unwrap_or(self.policy())
    }

    /// Device of reward models and local judges.
    pub fn reward(&self) -> Placement {
        self.reward.unwrap_or(self.policy())
    }

    /// Device of the sampler.
    pub fn sampler(&self) -> Placement {
        self.sampler.unwrap_or(self.policy())
    }

    /// CPU threads of all roles but the sampler; 0 for one for each core.
    pub fn shared_threads(&self) -> usize {
        match (self.threads, self.sampler_threads) {
            (threads, 0) => threads,
            (0, own) => {
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                cores.saturating_sub(own).max(1)
            }
            (threads, own) => threads.saturating_sub(own).max(1),
        }
    }

    /// Every device, some of them more than once.
    pub fn all(&self) -> Vec<Placement> {
        let mut all = self.policy_members();
        all.extend(self.critic_members());
        all.extend([self.reference(), self.reward(), self.sampler()]);
        all
    }

    /// Reports members that cannot share the leaves of a step.
    pub fn check(&self, leaves: usize, keys: &mut Keys) {
        for (key, members) in [("policy", &self.policy), ("critic", &self.critic)] {
            let mut section = keys.section("placement");
            let n = members.len();
            if n > 0 && !leaves.is_multiple_of(n) {
                let message = format!(
                    "has {n} members, which do not divide `optimizer.leaves` = {leaves} (the parts of a step); set \
                     `optimizer.leaves` to a multiple of {n}"
                );
                section.problem(key, message);
            }
            let on_cpu = members.iter().filter(|p| **p == Placement::Cpu).count();
            if on_cpu != 0 && on_cpu != n {
                section.problem(key, "mixes `cpu` and `cuda`, which round differently; name devices of one kind");
            }
        }
    }
}

impl Settings for PlacementSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("placement");
        let wanted = "a device, \"cpu\" or \"cuda:N\", or a list of devices";
        let mut members = |key, value: &mut Vec<Placement>, help| {
            let values = "\"cpu\", \"cuda:N\", or a list of them";
            s.speed().one_or_more(key, value, values, wanted, help);
        };
        members(
            "policy",
            &mut self.policy,
            "Device of the policy (default `cpu`). A list makes it a group of members, which share its work; `\"cpu\"` given \
             n times gives each an n-th of the threads. Their number must divide `optimizer.leaves`. Changes the speed, no result.",
        );
        members(
            "critic",
            &mut self.critic,
            "Device of the critic, or devices of its members (default: those of the policy).",
        );
        let mut place = |key, value: &mut Option<Placement>, help| {
            s.speed().parsed(key, value, "\"cpu\" or \"cuda:N\"", "a device: \"cpu\" or \"cuda:N\"", help);
        };
        place("reference", &mut self.reference, "Device of the reference (default: the first of the policy).");
        let help = "Device of trained reward models (default: the first of the policy).";
        place("reward", &mut self.reward, help);
        let help = "Device of the sampler, with `rollout.ahead` (default: the first of the policy).";
        place("sampler", &mut self.sampler, help);
        s.speed().integer(
            "sampler_threads",
            &mut self.sampler_threads,
            Range::within(0.0, 1024.0),
            "With `rollout.ahead`: CPU threads of the sampler's own, taken from `threads`, so that it generates while the policy \
             learns; 0 makes them take turns.",
        );
        let help = "CPU threads; 0 takes one for each core. Changes the speed, no result.";
        s.speed().integer("threads", &mut self.threads, Range::within(0.0, 1024.0), help);
    }
}
