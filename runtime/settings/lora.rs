//! `[lora]`

use std::path::PathBuf;

use rehearsal_lm::LoraConfig;

use crate::config::{Keys, Range, Settings};

/// Linear layers of a Llama, by their last names.
const ALL_TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// `[lora]`: adapters are trained in place of the weights.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    /// Rank of new adapters; 0 trains the weights.
    pub rank: usize,
    /// α of the scale `α / rank`.
    pub alpha: f64,
    /// Layers with adapters; empty for all of a Llama's.
    pub targets: Vec<String>,
    /// Adapters to begin with.
    pub adapter: Option<PathBuf>,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self { rank: 0, alpha: 16.0, targets: Vec::new(), adapter: None }
    }
}

impl LoraSettings {
    /// Whether adapters are trained.
    pub fn enabled(&self) -> bool {
        self.rank > 0 || self.adapter.is_some()
    }

    /// Settings of new adapters.
    pub fn config(&self) -> LoraConfig {
        let targets =
            if self.targets.is_empty() { ALL_TARGETS.map(String::from).to_vec() } else { self.targets.clone() };
        LoraConfig { rank: self.rank, alpha: self.alpha, targets }
    }
}

impl Settings for LoraSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("lora");
        let help = "Train adapters of this rank in place of the weights; 0 trains the weights.";
        s.integer("rank", &mut self.rank, Range::within(0.0, 4096.0), help);
        let help = "The adapters' product is scaled by this divided by the rank.";
        s.number("alpha", &mut self.alpha, Range::above(0.0), help);
        s.texts(
            "targets",
            &mut self.targets,
            "a list of layers",
            "Linear layers that have adapters, by their last names. Without it, all of a Llama's: `q_proj`, `k_proj`, \
             `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`.",
        );
        let help = "Adapters in PEFT's format to begin with; rank, scale and layers are then theirs.";
        s.path("adapter", &mut self.adapter, help);
    }
}
