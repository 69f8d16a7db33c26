//! A model that is trained: its weights, their optimiser, the average of its weights, and the sampler. The policy and
//! the critic are both one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Var};
use rehearsal_learn::{AdamW, AdamWConfig, clip_scale, ema, global_norm};
use rehearsal_lm::generate::{Completion, Generator, Options, Request};
use rehearsal_lm::{Checkpoint, Decoder, HeadKind, Lora, LoraConfig, Parameters, Precision, Recording};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::device::Seat;
use crate::objective::Pass;
use crate::passes;
use crate::role::{Build, Machine, Reply, Ticket, answer, local_message};
use crate::{Devices, Error, Marked, ModelSnapshot, Objective, Placement, Result, Stats, StepTimes, Tokens};

/// Settings of a trained model that do not change during a job.
#[derive(Debug, Clone)]
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
    /// Train adapters in the place of the weights.
    pub lora: Option<LoraStart>,
}

/// Where adapters begin.
#[derive(Debug, Clone)]
pub struct LoraStart {
    pub config: LoraConfig,
    /// Adapters in PEFT's format to begin with, in the place of new ones.
    pub adapter: Option<PathBuf>,
    /// Of new ones.
    pub seed: u64,
}

impl LoraStart {
    /// The adapters at the start of training, for a model that they must fit.
    pub(crate) fn load(&self, base: &Checkpoint, device: &Device) -> Result<Lora> {
        Ok(match &self.adapter {
            Some(directory) => Lora::open(base, directory, device)?,
            None => Lora::new(base, self.config.clone(), device, self.seed)?,
        })
    }
}

/// One optimiser step.
#[derive(Debug, Clone)]
pub struct UpdateBatch {
    pub objective: Arc<dyn Objective>,
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

pub(crate) enum TrainedMsg {
    Generate {
        requests: Vec<Request>,
        options: Box<Options>,
        keep_tokens: usize,
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
    lora: Option<Lora>,
    optimizer: AdamW,
    average: Option<Parameters>,
    version: u64,
    /// Packed weights of the current version, made when needed and dropped before an update.
    generator: Option<Generator>,
    /// What the current version computed of its last completions.
    recording: Option<Recording>,
}

impl Trained {
    fn new(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: &Devices) -> Result<Self> {
        let seat = devices.seat(config.placement)?;
        let decoder = checkpoint
            .trainable(&seat.device, DType::F32)?
            .with_precision(config.precision)
            .with_gradient_checkpointing(config.gradient_checkpointing);
        let lora = config.lora.as_ref().map(|start| start.load(&checkpoint, &seat.device)).transpose()?;
        if let Some(lora) = &lora {
            lora.apply(&checkpoint, &decoder)?;
        }
        let trained = lora.as_ref().map_or(decoder.variables(), Lora::variables);
        let optimizer = AdamW::new(trained, config.optimizer)?;
        let average = config.ema_decay.map(|_| copies(trained)).transpose()?;
        Ok(Self {
            checkpoint,
            seat,
            config,
            decoder,
            lora,
            optimizer,
            average,
            version: 0,
            generator: None,
            recording: None,
        })
    }

    /// What the optimiser changes, by name: the weights, or their adapters.
    fn variables(&self) -> &BTreeMap<String, Var> {
        self.lora.as_ref().map_or(self.decoder.variables(), Lora::variables)
    }

    pub fn build(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: Devices) -> Build<Self> {
        Arc::new(move || Trained::new(checkpoint.clone(), config.clone(), &devices))
    }

    fn generate(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        keep_tokens: usize,
        finished: UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
        self.recording = None;
        let mut generator = match self.generator.take() {
            Some(generator) => generator,
            None => self.seat.run(|| Generator::new(&self.decoder))?,
        };
        let text = &self.checkpoint.text;
        let result = self.seat.run(|| {
            let mut finished = |completion| {
                let _ = finished.send(completion); // a caller that has gone needs no more
            };
            let cancelled = || cancel.is_cancelled();
            generator.generate_recorded(requests, options, Some(text), &cancelled, &mut finished, keep_tokens)
        });
        self.generator = Some(generator);
        self.recording = result?;
        Ok(())
    }

    fn logprobs(&self, tokens: &[Tokens], temperature: f64) -> Result<Vec<Vec<f32>>> {
        let said = |t: &Tokens| self.recording.as_ref()?.logprobs(&t.prompt, &t.completion, temperature);
        match tokens.iter().map(|t| said(t).map(<[f32]>::to_vec)).collect() {
            Some(known) => Ok(known),
            None => {
                let budget = self.config.micro_batch_tokens;
                self.seat.run(|| passes::logprobs(&self.decoder, tokens, temperature, budget))
            }
        }
    }

    fn step(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        self.generator = None;
        let seat = self.seat.clone();
        seat.run(|| self.update(batch, cancel))
    }

    fn update(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        let decoder = self.decoder.clone();
        let (budget, recording) = (self.config.micro_batch_tokens, self.recording.take());
        let mut pass = Pass::new(&decoder, batch.temperature, budget, cancel, recording);
        batch.objective.accumulate(&mut pass)?;
        let (stats, loss, tokens, mut times) = (pass.stats(), pass.loss(), pass.tokens(), pass.times());
        let start = Instant::now();
        let gradients = pass.gradients.complete(&decoder)?;
        let gradients = match &self.lora {
            Some(lora) => lora.gradients(gradients)?,
            None => gradients,
        };
        let grad_norm = global_norm(&gradients)?;
        for (what, value) in [("loss", loss), ("gradient norm", grad_norm)] {
            if !value.is_finite() {
                return Err(Error::NotFinite { what, value });
            }
        }
        let scale = clip_scale(grad_norm, self.config.max_grad_norm);
        let trained = self.lora.as_ref().map_or(decoder.variables(), Lora::variables);
        self.optimizer.step(trained, &gradients, batch.learning_rate, scale)?;
        if let Some(lora) = &self.lora {
            lora.apply(&self.checkpoint, &decoder)?;
        }
        self.version += 1;
        if let (Some(average), Some(decay)) = (&mut self.average, self.config.ema_decay) {
            for (name, weight) in trained {
                if let Some(entry) = average.get_mut(name) {
                    *entry = ema::update(entry, &weight.as_detached_tensor(), decay)?;
                }
            }
        }
        times.optimizer = start.elapsed();
        Ok(StepReport { version: self.version, tokens, loss, grad_norm, stats, times })
    }

    fn snapshot(&self) -> ModelSnapshot {
        let (steps, optimizer) = (self.optimizer.steps(), self.optimizer.state());
        ModelSnapshot::new(self.version, steps, self.variables(), self.average.as_ref(), optimizer)
    }

    fn restore(&mut self, snapshot: &ModelSnapshot) -> Result<()> {
        (self.generator, self.recording) = (None, None);
        for (name, var) in self.variables() {
            let tensor = snapshot.weight(name)?;
            var.set(&tensor.to_device(&self.seat.device)?.to_dtype(var.dtype())?)?;
        }
        if let Some(lora) = &self.lora {
            lora.apply(&self.checkpoint, &self.decoder)?;
        }
        if let Some(average) = &mut self.average {
            for (name, entry) in average.iter_mut() {
                *entry = snapshot.average(name)?.to_device(&self.seat.device)?;
            }
        }
        self.optimizer.restore(snapshot.optimizer_steps, &snapshot.tensors)?;
        self.version = snapshot.version;
        Ok(())
    }

    /// Writes the averaged weights where there are some, else the weights; adapters merged, and beside them.
    fn export(&self, directory: &std::path::Path, dtype: DType) -> Result<()> {
        if let Some(average) = &self.average {
            let now = copies(self.variables())?;
            self.put(average)?;
            let result = self.write(directory, dtype);
            self.put(&now)?;
            return result;
        }
        self.write(directory, dtype)
    }

    /// Sets what is trained.
    fn put(&self, values: &Parameters) -> Result<()> {
        for (name, value) in values {
            if let Some(var) = self.variables().get(name) {
                var.set(value)?;
            }
        }
        match &self.lora {
            Some(lora) => Ok(lora.apply(&self.checkpoint, &self.decoder)?),
            None => Ok(()),
        }
    }

    fn write(&self, directory: &std::path::Path, dtype: DType) -> Result<()> {
        self.checkpoint.save(&self.decoder.parameters(), directory, dtype)?;
        match &self.lora {
            Some(lora) => Ok(lora.save(&self.checkpoint, &directory.join("adapter"))?),
            None => Ok(()),
        }
    }
}

/// Variables as they are now.
fn copies(variables: &BTreeMap<String, Var>) -> Result<Parameters> {
    variables.iter().map(|(name, var)| Ok((name.clone(), var.as_detached_tensor().copy()?))).collect()
}

impl Machine for Trained {
    type Message = TrainedMsg;

    fn apply(&mut self, message: TrainedMsg) {
        let budget = self.config.micro_batch_tokens;
        match message {
            TrainedMsg::Generate { requests, options, keep_tokens, finished, cancel, reply, .. } => {
                answer(reply, self.generate(requests, &options, keep_tokens, finished, &cancel))
            }
            TrainedMsg::Logprobs { tokens, temperature, reply, .. } => {
                answer(reply, self.logprobs(&tokens, temperature))
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
