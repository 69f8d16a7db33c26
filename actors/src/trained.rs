//! A model that is trained: its weights, their optimiser, the average of its weights, and the sampler. The policy and
//! the critic are both one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use rehearsal_learn::{AdamW, AdamWConfig, clip_scale, ema, global_norm};
use rehearsal_lm::generate::{Completion, Generator, Options, Request};
use rehearsal_lm::{Checkpoint, Decoder, HeadKind, Parameters, Precision};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::device::Seat;
use crate::objective::Pass;
use crate::passes;
use crate::role::{Build, Machine, Reply, Ticket, answer, local_message};
use crate::{Devices, Error, Marked, Objective, Placement, Result, Stats, StepTimes, Tokens};

/// Settings of a trained model that do not change during a job.
#[derive(Debug, Clone, Copy)]
pub struct TrainedConfig {
    pub placement: Placement,
    pub optimizer: AdamWConfig,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: Option<f64>,
    /// Tokens of a micro-batch at most; what belongs together is never split.
    pub micro_batch_tokens: usize,
    /// What the factors of matrix products are rounded to; the weights stay f32.
    pub precision: Precision,
    /// Activations are computed again on the way back instead of kept.
    pub gradient_checkpointing: bool,
    /// Decay of an exponential moving average of the weights, kept beside them.
    pub ema_decay: Option<f64>,
}

/// One optimiser step.
#[derive(Debug, Clone)]
pub struct UpdateBatch {
    pub objective: Objective,
    pub learning_rate: f64,
    /// Temperature of all log-probabilities, as completions were sampled.
    pub temperature: f64,
}

/// What an optimiser step did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepReport {
    pub version: u64,
    /// Tokens that went through forward and backward.
    pub tokens: usize,
    pub loss: f64,
    /// Global norm before clipping.
    pub grad_norm: f64,
    pub stats: Stats,
    pub times: StepTimes,
}

/// Weights and optimiser, sharing storage with the model: save it before the next step.
#[derive(Clone, Default)]
pub struct ModelSnapshot {
    pub version: u64,
    pub optimizer_steps: u64,
    /// `weights.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, and `average.NAME` where weights are averaged.
    pub tensors: BTreeMap<String, Tensor>,
}

pub(crate) enum TrainedMsg {
    Generate {
        requests: Vec<Request>,
        options: Box<Options>,
        finished: UnboundedSender<Completion>,
        cancel: CancellationToken,
        _ticket: Ticket,
        reply: Reply<()>,
    },
    Logprobs {
        tokens: Vec<Tokens>,
        temperature: f64,
        _ticket: Ticket,
        reply: Reply<Vec<Vec<f32>>>,
    },
    Likelihoods {
        sequences: Vec<Marked>,
        _ticket: Ticket,
        reply: Reply<Vec<f64>>,
    },
    Values {
        tokens: Vec<Tokens>,
        _ticket: Ticket,
        reply: Reply<Vec<Vec<f32>>>,
    },
    Scores {
        tokens: Vec<Tokens>,
        _ticket: Ticket,
        reply: Reply<Vec<f32>>,
    },
    Step {
        batch: Box<UpdateBatch>,
        cancel: CancellationToken,
        _ticket: Ticket,
        reply: Reply<StepReport>,
    },
    Snapshot {
        _ticket: Ticket,
        reply: Reply<ModelSnapshot>,
    },
    Restore {
        snapshot: Box<ModelSnapshot>,
        _ticket: Ticket,
        reply: Reply<()>,
    },
    Export {
        directory: PathBuf,
        dtype: DType,
        _ticket: Ticket,
        reply: Reply<()>,
    },
}
local_message!(TrainedMsg);

/// The machine of the policy and of the critic.
pub(crate) struct Trained {
    checkpoint: Arc<Checkpoint>,
    seat: Seat,
    config: TrainedConfig,
    decoder: Decoder,
    optimizer: AdamW,
    average: Option<Parameters>,
    version: u64,
    /// Packed weights of the current version, made when needed and dropped before an update.
    generator: Option<Generator>,
}

impl Trained {
    fn new(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: &Devices) -> Result<Self> {
        let seat = devices.seat(config.placement)?;
        let decoder = checkpoint
            .trainable(&seat.device, DType::F32)?
            .with_precision(config.precision)
            .with_gradient_checkpointing(config.gradient_checkpointing);
        let optimizer = AdamW::new(decoder.variables(), config.optimizer)?;
        let average = config.ema_decay.map(|_| copies(&decoder)).transpose()?;
        Ok(Self { checkpoint, seat, config, decoder, optimizer, average, version: 0, generator: None })
    }

    pub fn build(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: Devices) -> Build<Self> {
        Arc::new(move || Trained::new(checkpoint.clone(), config, &devices))
    }

    fn generate(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        finished: UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let mut generator = match self.generator.take() {
            Some(generator) => generator,
            None => self.seat.run(|| Generator::new(&self.decoder))?,
        };
        let text = &self.checkpoint.text;
        let result = self.seat.run(|| {
            generator.generate(requests, options, Some(text), &|| cancel.is_cancelled(), &mut |completion| {
                let _ = finished.send(completion); // a caller that has gone needs no more
            })
        });
        self.generator = Some(generator);
        Ok(result?)
    }

    fn step(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        self.generator = None;
        let seat = self.seat.clone();
        seat.run(|| self.update(batch, cancel))
    }

    fn update(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        let mut pass = Pass::new(&self.decoder, batch.temperature, self.config.micro_batch_tokens, cancel);
        pass.run(&batch.objective)?;
        let (stats, loss, tokens, mut times) = (pass.stats(), pass.loss, pass.tokens, pass.times);
        let start = Instant::now();
        let gradients = pass.gradients.complete(&self.decoder)?;
        let grad_norm = global_norm(&gradients)?;
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { what, value });
            }
        }
        let scale = clip_scale(grad_norm, self.config.max_grad_norm);
        self.optimizer.step(self.decoder.variables(), &gradients, batch.learning_rate, scale)?;
        self.version += 1;
        if let (Some(average), Some(decay)) = (&mut self.average, self.config.ema_decay) {
            for (name, weight) in self.decoder.parameters() {
                if let Some(entry) = average.get_mut(&name) {
                    *entry = ema::update(entry, &weight, decay)?;
                }
            }
        }
        times.optimizer = start.elapsed();
        Ok(StepReport { version: self.version, tokens, loss, grad_norm, stats, times })
    }

    fn snapshot(&self) -> ModelSnapshot {
        let named = |prefix: &'static str, tensors: Parameters| {
            tensors.into_iter().map(move |(name, t)| (format!("{prefix}{name}"), t))
        };
        let weights = named("weights.", self.decoder.parameters());
        let average = named("average.", self.average.clone().unwrap_or_default());
        ModelSnapshot {
            version: self.version,
            optimizer_steps: self.optimizer.steps(),
            tensors: weights.chain(self.optimizer.state()).chain(average).collect(),
        }
    }

    fn restore(&mut self, snapshot: &ModelSnapshot) -> Result<()> {
        self.generator = None;
        let get = |name: &str| {
            let missing = || rehearsal_learn::Error::Moments(format!("the snapshot has no `{name}`"));
            snapshot.tensors.get(name).ok_or_else(missing)
        };
        for (name, var) in self.decoder.variables() {
            let tensor = get(&format!("weights.{name}"))?;
            var.set(&tensor.to_device(&self.seat.device)?.to_dtype(var.dtype())?)?;
        }
        if let Some(average) = &mut self.average {
            for (name, entry) in average.iter_mut() {
                *entry = get(&format!("average.{name}"))?.to_device(&self.seat.device)?;
            }
        }
        self.optimizer.restore(snapshot.optimizer_steps, &snapshot.tensors)?;
        self.version = snapshot.version;
        Ok(())
    }

    /// Writes the averaged weights where there are some, else the weights.
    fn export(&self, directory: &std::path::Path, dtype: DType) -> Result<()> {
        let weights = self.average.clone().unwrap_or_else(|| self.decoder.parameters());
        Ok(self.checkpoint.save(&weights, directory, dtype)?)
    }
}

/// The weights as they are now.
fn copies(decoder: &Decoder) -> Result<Parameters> {
    decoder.parameters().into_iter().map(|(name, t)| Ok((name, t.copy()?))).collect()
}

impl Machine for Trained {
    type Message = TrainedMsg;

    fn apply(&mut self, message: TrainedMsg) {
        let budget = self.config.micro_batch_tokens;
        match message {
            TrainedMsg::Generate { requests, options, finished, cancel, reply, .. } => {
                answer(reply, self.generate(requests, &options, finished, &cancel))
            }
            TrainedMsg::Logprobs { tokens, temperature, reply, .. } => {
                answer(reply, self.seat.run(|| passes::logprobs(&self.decoder, &tokens, temperature, budget)))
            }
            TrainedMsg::Likelihoods { sequences, reply, .. } => {
                answer(reply, self.seat.run(|| passes::likelihoods(&self.decoder, &sequences, budget)))
            }
            TrainedMsg::Values { tokens, reply, .. } => {
                answer(reply, self.seat.run(|| passes::values(&self.decoder, &tokens, budget)))
            }
            TrainedMsg::Scores { tokens, reply, .. } => {
                answer(reply, self.seat.run(|| passes::scores(&self.decoder, &tokens, budget)))
            }
            TrainedMsg::Step { batch, cancel, reply, .. } => answer(reply, self.step(&batch, &cancel)),
            TrainedMsg::Snapshot { reply, .. } => answer(reply, Ok(self.snapshot())),
            TrainedMsg::Restore { snapshot, reply, .. } => answer(reply, self.restore(&snapshot)),
            TrainedMsg::Export { directory, dtype, reply, .. } => answer(reply, self.export(&directory, dtype)),
        }
    }
}

/// Which head a role's model must have.
pub(crate) fn check_head(checkpoint: &Checkpoint, head: HeadKind, role: &'static str) -> Result<()> {
    match (checkpoint.architecture.head == head, head) {
        (true, _) => Ok(()),
        (false, HeadKind::Score) => Err(Error::Start { role, reason: "its model has no `score` head".into() }),
        (false, HeadKind::Language) => Err(Error::Start { role, reason: "its model is no language model".into() }),
    }
}
