//! What a job's memory goes to: predicted from the configuration, and measured.

use rehearsal_actors::Placement;
use rehearsal_lm::Architecture;
use serde::{Deserialize, Serialize};

use crate::driver::{RolloutSettings, recorded_tokens};
use crate::settings::Common;

/// Bytes by purpose, for a job whose roles are on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBudget {
    /// The trained weights, f32, of all members, and with `rollout.ahead` the sampler's and the scheduled versions.
    pub weights: u64,
    /// The reference's weights.
    pub reference: u64,
    /// Both moments of the optimiser.
    pub moments: u64,
    /// Gradients, f32; only while a step is taken.
    pub gradients: u64,
    /// What a micro-batch keeps for the backward pass; only while a step is taken.
    pub activations: u64,
    /// Packed weights and the cache, and what is kept for the update; only while completions are generated.
    pub generation: u64,
    /// The most that is held at a time.
    pub peak: u64,
}

impl MemoryBudget {
    /// The budget of a job whose prompts have `prompt_tokens` tokens on average; `None` if a role is not on the CPU.
    pub fn predict(
        config: &Common,
        rollout: &RolloutSettings,
        model: &Architecture,
        prompt_tokens: u64,
    ) -> Option<Self> {
        if config.placement.policy() != Placement::Cpu || config.placement.reference() != Placement::Cpu {
            return None;
        }
        let members = config.placement.policy_members().len() as u64;
        // A member adds its leaves in a tree, and holds a sum for each of its levels beside that of the leaf in progress.
        let sums = 1 + (config.optimizer.leaves as u64 / members).max(1).ilog2() as u64;
        let precision = config.model.dtype;
        let parameters = model.parameter_count();
        let (prompts, new) = (rollout.prompts_per_step as u64, rollout.max_new_tokens as u64);
        let completions = rollout.completions_per_step() as u64;
        let all = prompts * prompt_tokens + completions * new;
        let keeps = recorded_tokens(config, true) as u64;
        // Else the best and the worst of each prompt's completions are computed again to be learned from.
        let tokens = if all <= keeps { all } else { prompts * (prompt_tokens + 2 * new) };
        let micro_batch = tokens.min(config.optimizer.micro_batch_tokens as u64);
        let holders = if config.optimizer.shard { 1 } else { members };
        let moments = holders * parameters * 2 * config.optimizer.adamw.moments.bits() / 8;
        // The weights before each of the steps that generation is ahead, the newest, and those that the sampler generates with.
        let copies = if rollout.ahead > 0 { members + rollout.ahead + 2 } else { members };
        let (weights, reference) = (4 * copies * parameters, precision.dtype().size_in_bytes() as u64 * parameters);
        let gradients = 4 * members * sums * parameters;
        let activations = model.activation_bytes(micro_batch, precision, config.optimizer.gradient_checkpointing);
        let generation = members * model.packed_bytes(precision)
            + model.cache_bytes(completions.min(rollout.batch as u64), prompt_tokens + new)
            + model.activation_bytes(all.min(keeps), precision, false);
        let peak = weights + reference + moments + generation.max(gradients + activations);
        Some(Self { weights, reference, moments, gradients, activations, generation, peak })
    }
}

impl MemoryBudget {
    /// The bytes by the names of their purposes.
    pub(crate) fn by_purpose(&self) -> [(&'static str, u64); 7] {
        let &Self { weights, reference, moments, gradients, activations, generation, peak } = self;
        [
            ("weights", weights),
            ("reference", reference),
            ("moments", moments),
            ("gradients", gradients),
            ("activations", activations),
            ("generation", generation),
            ("peak", peak),
        ]
    }
}

/// The most memory this process has held so far, in bytes, where the system says so.
pub fn measured_peak() -> Option<u64> {
    of_process("VmHWM:")
}

/// The memory this process holds, in bytes, where the system says so.
pub(crate) fn measured() -> Option<u64> {
    of_process("VmRSS:")
}

fn of_process(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    #[test]
    fn bf16_and_checkpointing_take_less() {
        let model = crate::embedded::model().unwrap().architecture;
        let predict = |toml: &str| {
            let source = format!("[job]\ndirectory = \"x\"\n{toml}");
            let config = Config::from_toml(&source, "/".as_ref()).unwrap();
            MemoryBudget::predict(&config.common, &RolloutSettings::default(), &model, 50).unwrap()
        };
        let full = predict("");
        assert_eq!(full.moments, 8 * model.parameter_count());
        let small =
            predict("[model]\ndtype = \"bf16\"\n[optimizer]\nmoments = \"bf16\"\ngradient_checkpointing = true\n");
        assert_eq!((small.moments * 2, small.reference * 2), (full.moments, full.reference));
        assert!(small.activations < full.activations && small.peak < full.peak);
        assert_eq!(small.gradients, full.gradients);
        // What is kept from generation on is held while it goes on.
        assert!(predict("[limits]\nkept_tokens = 0\n").generation < full.generation);
        // Two members have a copy each, and each of them a sum of its first two leaves, of its last two, and a leaf.
        let group = predict("[optimizer]\nleaves = 8\n[placement]\npolicy = [\"cpu\", \"cpu\"]\n");
        assert_eq!((group.weights, group.moments), (2 * full.weights, 2 * full.moments));
        assert_eq!(group.gradients, 2 * 3 * full.gradients);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_peak_is_measured() {
        let (current, peak) = (measured().unwrap(), measured_peak().unwrap());
        assert!(1 << 20 < current && current <= peak.max(measured_peak().unwrap()));
    }
}
