//! A trained model: weights or adapters, optimizer, moving average of the weights, and sampler. The roles of policy and
//! critic are both trained models.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Var};
use rehearsal_learn::{AdamW, AdamWConfig, clip_scale, ema, global_norm};
use rehearsal_lm::generate::{Completion, Generator, Options, Request};
use rehearsal_lm::{Checkpoint, Decoder, HeadKind, Lora, LoraConfig, Parameters, Precision, Recording};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::device::SharedDevice;
use crate::objective::Pass;
use crate::passes;
use crate::role::{Build, Permit, Reply, StateMachine, answer, local_message};
use crate::{Devices, Error, MaskedSequence, ModelSnapshot, Objective, Placement, Result, Stats, StepTimes, Tokens};

/// Settings of a trained model, constant during a job.
#[derive(Debug, Clone)]
pub struct TrainedConfig {
    /// Device of the role.
    pub placement: Placement,
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
#[derive(Debug, Clone)]
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

/// State of the policy and of the critic.
pub(crate) struct Trained {
    checkpoint: Arc<Checkpoint>,
    devices: Devices,
    compute: SharedDevice,
    config: TrainedConfig,
    /// Whether the weights are those that the job expects: not those of a restarted role that has yet to be restored.
    ready: bool,
    decoder: Decoder,
    lora: Option<Lora>,
    optimizer: AdamW,
    average: Option<Parameters>,
    version: u64,
    /// Sampler with packed weights of the current version; built when needed and dropped before an update.
    generator: Option<Generator>,
    /// Activations of the completions that the current version sampled last.
    recording: Option<Recording>,
}

impl Trained {
    fn new(checkpoint: Arc<Checkpoint>, config: TrainedConfig, devices: &Devices) -> Result<Self> {
        let compute = devices.get(config.placement)?;
        let decoder = checkpoint
            .trainable(&compute.device, DType::F32)?
            .with_precision(config.precision)
            .with_gradient_checkpointing(config.gradient_checkpointing);
        let lora = config.lora.as_ref().map(|start| start.load(&checkpoint, &compute.device)).transpose()?;
        if let Some(lora) = &lora {
            lora.apply(&checkpoint, &decoder)?;
        }
        let trained = lora.as_ref().map_or(decoder.variables(), Lora::variables);
        let optimizer = AdamW::new(trained, config.optimizer)?;
        let average = config.ema_decay.map(|_| copies(trained)).transpose()?;
        Ok(Self {
            checkpoint,
            devices: devices.clone(),
            compute,
            config,
            ready: true,
            decoder,
            lora,
            optimizer,
            average,
            version: 0,
            generator: None,
            recording: None,
        })
    }

    /// The variables that the optimizer updates, by name: the weights, or their adapters.
    fn variables(&self) -> &BTreeMap<String, Var> {
        self.lora.as_ref().map_or(self.decoder.variables(), Lora::variables)
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

    fn generate(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        keep_tokens: usize,
        finished: UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<u64> {
        // Completions that record nothing leave what an update has yet to use.
        if keep_tokens > 0 {
            self.recording = None;
        }
        let mut generator = match self.generator.take() {
            Some(generator) => generator,
            None => self.compute.run(|| Generator::new(&self.decoder))?,
        };
        let text = &self.checkpoint.text;
        let result = self.compute.run(|| {
            let mut finished = |completion| {
                let _ = finished.send(completion); // the caller may have been dropped
            };
            let cancelled = || cancel.is_cancelled();
            generator.generate_recorded(requests, options, Some(text), &cancelled, &mut finished, keep_tokens)
        });
        self.generator = Some(generator);
        let recording = result?;
        if keep_tokens > 0 {
            self.recording = recording;
        }
        Ok(self.version)
    }

    fn logprobs(&self, tokens: &[Tokens], temperature: f64) -> Result<Vec<Vec<f32>>> {
        let recorded = |t: &Tokens| self.recording.as_ref()?.logprobs(&t.prompt, &t.completion, temperature);
        match tokens.iter().map(|t| recorded(t).map(<[f32]>::to_vec)).collect() {
            Some(known) => Ok(known),
            None => {
                let budget = self.config.micro_batch_tokens;
                self.compute.run(|| passes::logprobs(&self.decoder, tokens, temperature, budget))
            }
        }
    }

    fn step(&mut self, batch: &UpdateBatch, cancel: &CancellationToken) -> Result<StepReport> {
        self.generator = None;
        let compute = self.compute.clone();
        compute.run(|| self.update(batch, cancel))
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
        check_finite(trained.iter().map(|(name, var)| (name, var.as_detached_tensor())))?;
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
            var.set(&tensor.to_device(&self.compute.device)?.to_dtype(var.dtype())?)?;
        }
        if let Some(lora) = &self.lora {
            lora.apply(&self.checkpoint, &self.decoder)?;
        }
        if let Some(average) = &mut self.average {
            for (name, entry) in average.iter_mut() {
                *entry = snapshot.average(name)?.to_device(&self.compute.device)?;
            }
        }
        self.optimizer.restore(snapshot.optimizer_steps, &snapshot.tensors)?;
        self.version = snapshot.version;
        self.ready = true;
        Ok(())
    }

    /// Writes the averaged weights if there are any, else the weights, with adapters merged in and also beside them.
    fn export(&self, directory: &std::path::Path, dtype: DType) -> Result<()> {
        if let Some(average) = &self.average {
            let current = copies(self.variables())?;
            self.set_variables(average)?;
            let result = self.write(directory, dtype);
            self.set_variables(&current)?;
            return result;
        }
        self.write(directory, dtype)
    }

    /// Sets the trained variables.
    fn set_variables(&self, values: &Parameters) -> Result<()> {
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
        let parameters = self.decoder.parameters();
        check_finite(parameters.iter().map(|(name, tensor)| (name, tensor.clone())))?;
        self.checkpoint.save(&parameters, directory, dtype)?;
        match &self.lora {
            Some(lora) => Ok(lora.save(&self.checkpoint, &directory.join("adapter"))?),
            None => Ok(()),
        }
    }
}

/// Checks that weights are numbers.
fn check_finite<'a>(weights: impl Iterator<Item = (&'a String, candle_core::Tensor)>) -> Result<()> {
    let weights = weights.map(|(name, tensor)| (name.clone(), tensor)).collect();
    if global_norm(&weights)?.is_finite() { Ok(()) } else { Err(Error::Diverged) }
}

/// Copies of the variables' current values.
fn copies(variables: &BTreeMap<String, Var>) -> Result<Parameters> {
    variables.iter().map(|(name, var)| Ok((name.clone(), var.as_detached_tensor().copy()?))).collect()
}

impl StateMachine for Trained {
    type Message = TrainedMsg;

    fn apply(&mut self, message: TrainedMsg) {
        if !self.ready && !matches!(message, TrainedMsg::Restore { .. } | TrainedMsg::Reset { .. }) {
            return; // the dropped reply tells the caller that the role died
        }
        let budget = self.config.micro_batch_tokens;
        match message {
            TrainedMsg::Generate { requests, options, keep_tokens, finished, cancel, reply, .. } => {
                answer(reply, self.generate(requests, &options, keep_tokens, finished, &cancel))
            }
            TrainedMsg::Logprobs { tokens, temperature, reply, .. } => {
                answer(reply, self.logprobs(&tokens, temperature))
            }
            TrainedMsg::Likelihoods { sequences, reply, .. } => {
                answer(reply, self.compute.run(|| passes::likelihoods(&self.decoder, &sequences, budget)))
            }
            TrainedMsg::Values { tokens, reply, .. } => {
                answer(reply, self.compute.run(|| passes::values(&self.decoder, &tokens, budget)))
            }
            TrainedMsg::Scores { tokens, reply, .. } => {
                answer(reply, self.compute.run(|| passes::scores(&self.decoder, &tokens, budget)))
            }
            TrainedMsg::Step { batch, cancel, reply, .. } => answer(reply, self.step(&batch, &cancel)),
            TrainedMsg::Snapshot { reply, .. } => answer(reply, Ok(self.snapshot())),
            TrainedMsg::Restore { snapshot, reply, .. } => answer(reply, self.restore(&snapshot)),
            TrainedMsg::Reset { reply, .. } => answer(reply, self.reset()),
            TrainedMsg::Export { directory, dtype, reply, .. } => answer(reply, self.export(&directory, dtype)),
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
