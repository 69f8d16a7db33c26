//! `[optimizer]`

use rehearsal_learn::{AdamRule, AdamWConfig, MomentType, ScheduleKind};

use crate::config::{Keys, Range, Settings};

/// `[optimizer]`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
    /// β₁, β₂, ε, weight decay and type of the moments.
    pub adamw: AdamWConfig,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the schedule after warm-up.
    pub schedule: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Gradients are scaled to this global norm if theirs is larger; `None` leaves them.
    pub max_grad_norm: Option<f64>,
    /// Parts that a step is cut into; 1 or more.
    pub leaves: usize,
    /// Whether members hold a part of the moments each.
    pub shard: bool,
    /// Tokens that go through a model at a time.
    pub micro_batch_tokens: usize,
    /// Activations are recomputed in the backward pass instead of kept.
    pub gradient_checkpointing: bool,
    /// Decay of the moving average of the weights that is exported in their place.
    pub ema_decay: Option<f64>,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            adamw: AdamWConfig::default(),
            learning_rate: 5e-7,
            schedule: ScheduleKind::Constant,
            warmup_steps: 0,
            max_grad_norm: Some(1.0),
            leaves: 1,
            shard: false,
            micro_batch_tokens: 4096,
            gradient_checkpointing: false,
            ema_decay: None,
        }
    }
}

impl Settings for OptimizerSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("optimizer");
        let decay = Range::within(0.0, 0.999_999);
        s.number("learning_rate", &mut self.learning_rate, Range::above(0.0), "Peak learning rate.");
        let mut floor = if let ScheduleKind::Cosine { floor } = self.schedule { floor } else { 0.0 };
        let help = "`cosine`: the last learning rate as a share of the peak.";
        s.number("min_lr_rate", &mut floor, Range::within(0.0, 1.0), help);
        if let ScheduleKind::Cosine { floor: own } = &mut self.schedule {
            *own = floor;
        }
        let schedules = [
            ("constant", ScheduleKind::Constant),
            ("constant_from_tenth", ScheduleKind::ConstantFromTenth),
            ("linear", ScheduleKind::Linear),
            ("cosine", ScheduleKind::Cosine { floor }),
        ];
        s.choice("schedule", &mut self.schedule, &schedules, "Shape of the learning rate after its warm-up.");
        s.integer("warmup_steps", &mut self.warmup_steps, Range::from(0.0), "Steps from 0 to the peak.");
        let help = "Gradients are scaled down to this global norm; 0 leaves them.";
        s.number_or_none("max_grad_norm", &mut self.max_grad_norm, Range::from(0.0), help);
        let adamw = &mut self.adamw;
        s.number("beta1", &mut adamw.beta1, decay, "AdamW: decay of the first moment.");
        s.number("beta2", &mut adamw.beta2, decay, "AdamW: decay of the second moment.");
        s.number("eps", &mut adamw.eps, Range::above(0.0), "AdamW: added to the root of the second moment.");
        let help = "AdamW: decoupled weight decay of matrices.";
        s.number("weight_decay", &mut adamw.weight_decay, Range::from(0.0), help);
        s.choice(
            "moments",
            &mut adamw.moments,
            &[("f32", MomentType::Full), ("bf16", MomentType::Bf16), ("int8", MomentType::Int8)],
            "AdamW: type that both moments are stored in. `bf16` takes half the memory, `int8` (with a scale for each block \
             of 256) a quarter; both are rounded stochastically.",
        );
        s.choice(
            "adam_rule",
            &mut adamw.rule,
            &[("corrected", AdamRule::Corrected), ("epsilon_hat", AdamRule::EpsilonHat)],
            "Where `eps` is added: to the bias-corrected moment (PyTorch), or as TensorFlow 1 did it, with smaller first \
             steps.",
        );
        let help =
            "Decay of a moving average of the weights, exported in their place (InstructGPT: 0.992); 0 keeps none.";
        s.number_or_none("ema_decay", &mut self.ema_decay, decay, help);
        s.integer(
            "leaves",
            &mut self.leaves,
            Range::within(1.0, 4096.0),
            "Parts that a step is cut into: ranges of its prompts or rows, whose gradients are added in a fixed tree. Any number of \
             members of `placement.policy` that divides it gives the same bits. Another value rounds differently.",
        );
        let help =
            "Members hold and update a part of the moments each (ZeRO, stage 1): less memory. Changes no result.";
        s.speed().flag("shard", &mut self.shard, help);
        s.speed().integer(
            "micro_batch_tokens",
            &mut self.micro_batch_tokens,
            Range::from(1.0),
            "Tokens that go through forward and backward pass at a time: memory against speed. Gradients are summed in the order \
             of these parts, so another value rounds differently.",
        );
        s.speed().flag(
            "gradient_checkpointing",
            &mut self.gradient_checkpointing,
            "Keep only the input of each block and run the block again in the backward pass: a third more work for much \
             less memory. Changes no result.",
        );
    }
}
