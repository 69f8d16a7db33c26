//! A trained model: weights or adapters, optimizer, moving average of the weights, and sampler, on one device or on
//! several. The roles of policy and critic are both trained models.
//!
//! A model on several devices is a group of members, each of which generates, reads and learns from its part of the data.
//! A step is cut into a fixed number of leaves, which are added in a fixed tree: the result does not depend on how many members
//! there are.

mod member;
mod members;
mod sum;
mod tree;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device};
use rehearsal_learn::{AdamWConfig, clip_scale};
use rehearsal_lm::generate::{Completion, Options, Request};
use rehearsal_lm::{Checkpoint, HeadKind, Lora, LoraConfig, Precision};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

pub(crate) use self::member::Member;
use self::members::Members;
pub(crate) use self::sum::LeafSum;
pub(crate) use self::tree::Tree;
use crate::role::{Build, Permit, Reply, StateMachine, answer, local_message};
use crate::{Devices, Error, MaskedSequence, ModelSnapshot, Objective, Placement, Result, Stats, StepTimes, Tokens};

/// Settings of a trained model, constant during a job.
#[derive(Debug, Clone)]
pub struct TrainedConfig {
    /// Device of each member; one or more, all CPU or all CUDA. Members on the CPU share its threads.
    pub placements: Vec<Placement>,
    /// Leaves that a step is cut into, a multiple of the number of members. It changes how gradients are rounded; the number of
    /// members does not.
    pub leaves: usize,
    /// Whether members share the moments of the optimizer: each holds and updates its part of the elements (ZeRO, stage 1). It
    /// changes no result.
    pub shard: bool,
    /// Settings of the optimizer.
    pub optimizer: AdamWConfig,
    /// Gradients are scaled down to this global norm if theirs is larger; `None` never scales.
    pub max_grad_norm: Option<f64>,
    /// Largest number of tokens of a micro-batch. An item, such as a pair or a ranking, is never split.
    pub micro_batch_tokens: usize,
    /// Type that the operands of matrix products are rounded to; the weights stay f32.
    pub precision: Precision,
    /// Whether the backward pass recomputes activations instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Decay of an exponential moving average of the weights, in `[0, 1)`; `None` keeps no average.
    pub ema_decay: Option<f64>,
    /// Adapters to train instead of the weights.
    pub lora: Option<LoraInit>,
}

/// What adapters are initialized from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoraInit {
    /// Rank, scale and layers of the adapters.
    pub config: LoraConfig,
    /// Directory of adapters in PEFT's format; `None` for new adapters by `config`.
    pub adapter: Option<PathBuf>,
    /// Seed of new adapters.
    pub seed: u64,
}

impl LoraInit {
    /// A model with the adapters that training starts from merged into its weights.
    ///
    /// # Errors
    ///
    /// As reading the adapters.
    pub fn merged(&self, base: &Checkpoint) -> Result<Checkpoint> {
        let merged = self.load(base, &Device::Cpu)?.merged(base, &Device::Cpu)?;
        let mut model = base.clone();
        model.parameters.extend(merged);
        Ok(model)
    }

    /// The same adapters without their directory, for another process that sets their weights itself.
    ///
    /// # Errors
    ///
    /// As reading the adapters.
    pub fn without_directory(&self, base: &Checkpoint) -> Result<Self> {
        let config = self.load(base, &Device::Cpu)?.config().clone();
        Ok(Self { config, adapter: None, seed: self.seed })
    }

    /// Loads or draws the adapters of a model at the start of training.
    pub(crate) fn load(&self, base: &Checkpoint, device: &Device) -> Result<Lora> {
        Ok(match &self.adapter {
            Some(directory) => Lora::open(base, directory, device)?,
            None => Lora::new(base, self.config.clone(), device, self.seed)?,
        })
    }
}

/// The input of one optimizer step.
#[derive(Debug, Clone)]
pub struct UpdateBatch {
    /// The loss and its data.
    pub objective: Arc<dyn Objective>,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Temperature of log-probabilities, above 0: the one that completions were sampled at, or 1.
    pub temperature: f64,
}

/// The result of one optimizer step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepReport {
    /// Version of the weights after the step.
    pub version: u64,
    /// Tokens that went through forward and backward passes.
    pub tokens: usize,
    /// Loss of the batch.
    pub loss: f64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Means of the objective's statistics.
    pub stats: Stats,
    /// Wall time by phase.
    pub times: StepTimes,
}

pub(crate) enum TrainedMsg {
    Generate {
        requests: Vec<Request>,
        options: Box<Options>,
        keep_tokens: usize,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
        _permit: Permit,
        reply: Reply<u64>,
    },
    Logprobs {
        tokens: Vec<Tokens>,
        temperature: f64,
        _permit: Permit,
        reply: Reply<Vec<Vec<f32>>>,
    },
    Likelihoods {
        sequences: Vec<MaskedSequence>,
        _permit: Permit,
        reply: Reply<Vec<f64>>,
    },
    Values {
        tokens: Vec<Tokens>,
        _permit: Permit,
        reply: Reply<Vec<Vec<f32>>>,
    },
    Scores {
        tokens: Vec<Tokens>,
        _permit: Permit,
        reply: Reply<Vec<f32>>,
    },
    Step {
        batch: Box<UpdateBatch>,
        cancel: CancellationToken,
        _permit: Permit,
        reply: Reply<StepReport>,
    },
    Snapshot {
        _permit: Permit,
        reply: Reply<ModelSnapshot>,
    },
    Weights {
        _permit: Permit,
        reply: Reply<ModelSnapshot>,
    },
    Restore {
        snapshot: Box<ModelSnapshot>,
        _permit: Permit,
        reply: Reply<()>,
    },
    Reset {
        _permit: Permit,
        reply: Reply<()>,
    },
    Export {
        directory: PathBuf,
        dtype: DType,
        _permit: Permit,
        reply: Reply<()>,
    },
}
local_message!(TrainedMsg);

/// State of the policy and of the critic: its members, which have the same weights between two requests.
pub(crate) struct Trained {
    checkpoint: Arc<Checkpoint>,
    devices: Devices,
    config: TrainedConfig,
    /// Whether the weights are those that the job expects: not those of a restarted role that has yet to be restored.
    ready: bool,
    version: u64,
    members: Members,
}

impl Trained {
    fn new(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: &Devices) -> Result<Self> {
        let members = Members::new(&checkpoint, &config, devices)?;
        Ok(Self { checkpoint, devices: devices.clone(), config, ready: true, version: 0, members })
    }

    /// Builds the model at the start of training. A model that is built again, after its role died, answers nothing before
    /// it has been restored or reset.
    pub fn build(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: Devices) -> Build<Self> {
        let built = AtomicBool::new(false);
        Arc::new(move || {
            let mut model = Trained::new(checkpoint.clone(), config.clone(), &devices)?;
            model.ready = !built.swap(true, Ordering::Relaxed);
            Ok(model)
        })
    }

    /// Returns to the start of training.
    fn reset(&mut self) -> Result<()> {
        if !self.ready || self.version > 0 {
            *self = Self::new(self.checkpoint.clone(), self.config.clone(), &self.devices.clone())?;
        }
        Ok(())
    }

    fn step(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        let summed = self.members.gradients(batch, cancel)?;
        let start = Instant::now();
        let (loss, grad_norm, tokens, stats) = (summed.sum.loss, summed.norm, summed.sum.tokens, summed.sum.stats());
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { what, value });
            }
        }
        let (scale, mut times) = (clip_scale(grad_norm, self.config.max_grad_norm), summed.times);
        self.members.update(summed, batch.learning_rate, scale)?;
        self.version += 1;
        times.optimizer += start.elapsed();
        Ok(StepReport { version: self.version, tokens, loss, grad_norm, stats, times })
    }

    fn restore(&mut self, snapshot: &ModelSnapshot) -> Result<()> {
        self.members.restore(snapshot)?;
        self.version = snapshot.version;
        self.ready = true;
        Ok(())
    }
}

impl StateMachine for Trained {
    type Message = TrainedMsg;

    fn apply(&mut self, message: TrainedMsg) {
        if !self.ready && !matches!(message, TrainedMsg::Restore { .. } | TrainedMsg::Reset { .. }) {
            return; // the dropped reply tells the caller that the role died
        }
        match message {
            TrainedMsg::Generate { requests, options, keep_tokens, finished, cancel, reply, .. } => {
                let result = self.members.generate(&requests, &options, keep_tokens, &finished, &cancel);
                drop(finished);
                answer(reply, result.map(|()| self.version))
            }
            TrainedMsg::Logprobs { tokens, temperature, reply, .. } => {
                answer(reply, self.members.logprobs(&tokens, temperature))
            }
            TrainedMsg::Likelihoods { sequences, reply, .. } => answer(reply, self.members.likelihoods(&sequences)),
            TrainedMsg::Values { tokens, reply, .. } => answer(reply, self.members.values(&tokens)),
            TrainedMsg::Scores { tokens, reply, .. } => answer(reply, self.members.scores(&tokens)),
            TrainedMsg::Step { batch, cancel, reply, .. } => answer(reply, self.step(&batch, &cancel)),
            TrainedMsg::Snapshot { reply, .. } => answer(reply, self.members.snapshot(self.version)),
            TrainedMsg::Weights { reply, .. } => answer(reply, self.members.first().weights(self.version)),
            TrainedMsg::Restore { snapshot, reply, .. } => answer(reply, self.restore(&snapshot)),
            TrainedMsg::Reset { reply, .. } => answer(reply, self.reset()),
            TrainedMsg::Export { directory, dtype, reply, .. } => {
                answer(reply, self.members.first().export(&directory, dtype))
            }
        }
    }
}

/// Checks that a role's model has the head that the role needs.
pub(crate) fn check_head(checkpoint: &Checkpoint, head: HeadKind, role: &'static str) -> Result<()> {
    match (checkpoint.architecture.head == head, head) {
        (true, _) => Ok(()),
        (false, HeadKind::Score) => Err(Error::Start {
            role,
            reason: "its model has no `score` head; train one with `algorithm = \"reward_model\"`".into(),
        }),
        (false, HeadKind::Language) => {
            Err(Error::Start { role, reason: "its model has a `score` head; a language model is needed".into() })
        }
    }
}
