//! `[rollout]`: how the policy answers prompts.

use rehearsal_lm::generate::Sampling;

use crate::config::{Keys, Range, Settings};
use crate::nodes::{COMPLETION_TOKENS_MAX, NodesSettings};
use crate::settings::Common;

/// `[rollout]`
#[derive(Debug, Clone, PartialEq)]
pub struct RolloutSettings {
    /// Prompts of a step; 1 or more.
    pub prompts_per_step: usize,
    /// Completions of each prompt, from 1 to 256.
    pub completions_per_prompt: usize,
    /// Tokens of a completion at most.
    pub max_new_tokens: usize,
    /// Tokens of a completion before an end-of-sequence token may be sampled.
    pub min_new_tokens: usize,
    /// Temperature, top-k, top-p and min-p.
    pub sampling: Sampling,
    /// Texts that end a completion.
    pub stop: Vec<String>,
    /// Sequences generated side by side at most.
    pub batch: usize,
    /// Steps that generation runs ahead of learning.
    pub ahead: u64,
    /// `[nodes]`: other processes that generate.
    pub nodes: NodesSettings,
}

impl Default for RolloutSettings {
    fn default() -> Self {
        Self {
            prompts_per_step: 8,
            completions_per_prompt: 2,
            max_new_tokens: 64,
            min_new_tokens: 0,
            sampling: Sampling { temperature: 0.9, ..Sampling::default() },
            stop: Vec::new(),
            batch: 64,
            ahead: 0,
            nodes: NodesSettings::default(),
        }
    }
}

impl RolloutSettings {
    /// Completions of a step.
    pub fn completions_per_step(&self) -> usize {
        self.prompts_per_step * self.completions_per_prompt
    }

    /// Temperature of log-probabilities: that of sampling.
    pub fn temperature(&self) -> f64 {
        self.sampling.logprob_temperature()
    }

    /// Reports a step that the rollout buffer cannot hold.
    pub fn check(&self, common: &Common, keys: &mut Keys) {
        let (completions, max) = (self.completions_per_step(), common.limits.rollouts_max);
        if completions > max {
            let message = format!("= {max} is less than the {completions} completions of a step");
            keys.section("limits").problem("rollouts_max", message);
        }
    }

    /// Reports fewer than two completions of a prompt; `who_needs` is the subject and verb of the reason.
    pub fn check_compared(&self, keys: &mut Keys, who_needs: &str) {
        let k = self.completions_per_prompt;
        if k < 2 {
            let message = format!("= {k} leaves nothing to compare with; {who_needs} 2 or more");
            keys.section("rollout").problem("completions_per_prompt", message);
        }
    }
}

impl Settings for RolloutSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("rollout");
        let help = "Prompts of an optimizer step.";
        s.integer("prompts_per_step", &mut self.prompts_per_step, Range::within(1.0, 65_536.0), help);
        s.integer(
            "completions_per_prompt",
            &mut self.completions_per_prompt,
            Range::within(1.0, 256.0),
            "Completions of a prompt: 2 or more where they are compared with one another. For `ppo`, 1 or more, and by default 1.",
        );
        let help = "Tokens of a completion at most.";
        s.integer("max_new_tokens", &mut self.max_new_tokens, Range::from(1.0), help);
        let help = "No end-of-sequence token before this many tokens.";
        s.integer("min_new_tokens", &mut self.min_new_tokens, Range::from(0.0), help);
        let (min, max) = (self.min_new_tokens, self.max_new_tokens);
        if min > max {
            s.problem("min_new_tokens", format!("= {min} exceeds `rollout.max_new_tokens` = {max}"));
        }
        let sampling = &mut self.sampling;
        let help = "Divides the logits, when sampling and in every log-probability.";
        s.number("temperature", &mut sampling.temperature, Range::above(0.0), help);
        let help = "Sample among the k most likely tokens; 0 among all.";
        s.integer("top_k", &mut sampling.top_k, Range::from(0.0), help);
        let help = "Sample among the most likely tokens that together reach this probability.";
        s.number("top_p", &mut sampling.top_p, Range::above_to(0.0, 1.0), help);
        let help = "Sample among tokens at least this many times as likely as the most likely one.";
        s.number("min_p", &mut sampling.min_p, Range::within(0.0, 1.0), help);
        s.texts("stop", &mut self.stop, "a list of texts", "Texts that end a completion.");
        let help = "Sequences generated side by side at most. Changes memory and speed, no result.";
        s.speed().integer("batch", &mut self.batch, Range::within(1.0, 4096.0), help);
        s.integer(
            "ahead",
            &mut self.ahead,
            Range::within(0.0, 64.0),
            "Steps that generation runs ahead of learning (η): the completions of step s are those of the policy before step s - η, \
             and are generated meanwhile (`placement.sampler`, `placement.sampler_threads`). 0 learns from the newest policy's.",
        );
        self.nodes.visit(keys);
        let tokens = self.max_new_tokens;
        if self.nodes.listen.is_some() && tokens > COMPLETION_TOKENS_MAX {
            let message =
                format!("= {tokens} is more than the {COMPLETION_TOKENS_MAX} that nodes (`nodes.listen`) can send");
            keys.section("rollout").problem("max_new_tokens", message);
        }
    }
}

/// Tokens of a step's completions, at most, whose activations generation records for the update on them.
pub fn recorded_tokens(common: &Common, updates_generator: bool) -> usize {
    if updates_generator && !common.optimizer.gradient_checkpointing {
        common.limits.kept_tokens.min(common.optimizer.micro_batch_tokens)
    } else {
        0
    }
}
