//! Settings that every job has, whatever its algorithm.

mod evaluation;
mod job;
mod limits;
mod lora;
mod metrics;
mod model;
mod optimizer;
mod placement;
mod view;
pub(crate) mod words;

pub use evaluation::{EvaluationSettings, Measure};
pub use job::{CheckpointSettings, JobSettings};
pub use limits::LimitsSettings;
pub use lora::LoraSettings;
pub use metrics::MetricsSettings;
pub use model::ModelSettings;
pub use optimizer::OptimizerSettings;
pub use placement::PlacementSettings;
pub use view::ViewSettings;

use rehearsal_actors::{LoraInit, Placement, TrainedConfig};
use rehearsal_learn::Schedule;

use crate::config::{Keys, Settings};

/// The sections that every job has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Common {
    /// `[job]`
    pub job: JobSettings,
    /// `[model]`
    pub model: ModelSettings,
    /// `[lora]`
    pub lora: LoraSettings,
    /// `[optimizer]`
    pub optimizer: OptimizerSettings,
    /// `[evaluation]`
    pub evaluation: EvaluationSettings,
    /// `[checkpoint]`
    pub checkpoint: CheckpointSettings,
    /// `[placement]`
    pub placement: PlacementSettings,
    /// `[limits]`
    pub limits: LimitsSettings,
    /// `[metrics]`
    pub metrics: MetricsSettings,
    /// `[view]`
    pub view: ViewSettings,
}

impl Settings for Common {
    fn visit(&mut self, keys: &mut Keys) {
        self.job.visit(keys);
        self.model.visit(keys);
        self.lora.visit(keys);
        self.optimizer.visit(keys);
        self.evaluation.visit(keys);
        self.checkpoint.visit(keys);
        self.placement.visit(keys);
        self.placement.check(self.optimizer.leaves, keys);
        self.limits.visit(keys);
        self.metrics.visit(keys);
        self.view.visit(keys);
    }
}

impl Common {
    /// Learning rates of the job.
    pub fn schedule(&self) -> Schedule {
        Schedule {
            kind: self.optimizer.schedule,
            peak: self.optimizer.learning_rate,
            warmup_steps: self.optimizer.warmup_steps,
            total_steps: self.job.steps,
        }
    }

    /// Settings of a model that is trained by members on these devices.
    pub(crate) fn trained(&self, placements: Vec<Placement>) -> TrainedConfig {
        TrainedConfig {
            placements,
            leaves: self.optimizer.leaves,
            shard: self.optimizer.shard,
            optimizer: self.optimizer.adamw,
            max_grad_norm: self.optimizer.max_grad_norm,
            micro_batch_tokens: self.optimizer.micro_batch_tokens,
            precision: self.model.dtype,
            gradient_checkpointing: self.optimizer.gradient_checkpointing,
            ema_decay: self.optimizer.ema_decay,
            lora: self.lora_init(),
        }
    }

    /// What adapters start from, if adapters are trained.
    pub(crate) fn lora_init(&self) -> Option<LoraInit> {
        self.lora.enabled().then(|| LoraInit {
            config: self.lora.config(),
            adapter: self.lora.adapter.clone(),
            seed: self.job.seed,
        })
    }
}
