//! One member of a trained model: a copy of the weights on its own device, their optimizer, and their sampler.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Tensor, Var};
use rehearsal_learn::adamw::{Ranges, shards};
use rehearsal_learn::{AdamW, ema, global_norm};
use rehearsal_lm::generate::{Completion, Generator, Options, Request};
use rehearsal_lm::{Checkpoint, Decoder, Lora, Parameters, Recording};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use super::sum::LeafSum;
use super::tree::Tree;
use super::{TrainedConfig, UpdateBatch};
use crate::device::SharedDevice;
use crate::objective::{Leaf, Pass};
use crate::passes;
use crate::{Error, ModelSnapshot, Result, Tokens};

/// A member. All members of a model have the same weights between two requests.
pub(crate) struct Member {
    checkpoint: Arc<Checkpoint>,
    pub compute: SharedDevice,
    config: TrainedConfig,
    pub decoder: Decoder,
    lora: Option<Lora>,
    optimizer: AdamW,
    /// The elements that this member updates; `None` for all.
    ranges: Option<Ranges>,
    average: Option<Parameters>,
    /// Sampler with packed weights of the current version; built when needed and dropped before an update.
    generator: Option<Generator>,
    /// Activations of the completions that the current version sampled last.
    recording: Option<Recording>,
}

impl Member {
    /// The model as training starts. `shard`: which of how many shards of the optimizer it holds.
    pub fn new(
        checkpoint: Arc<Checkpoint>,
        config: TrainedConfig,
        compute: SharedDevice,
        shard: Option<(usize, usize)>,
    ) -> Result<Self> {
        let decoder = checkpoint
            .trainable(&compute.device, DType::F32)?
            .with_precision(config.precision)
            .with_gradient_checkpointing(config.gradient_checkpointing);
        let lora = config.lora.as_ref().map(|start| start.load(&checkpoint, &compute.device)).transpose()?;
        if let Some(lora) = &lora {
            lora.apply(&checkpoint, &decoder)?;
        }
        let trained = lora.as_ref().map_or(decoder.variables(), Lora::variables);
        let ranges = shard.map(|(index, count)| shards(trained, count).swap_remove(index));
        let optimizer = match &ranges {
            Some(ranges) => AdamW::of_shard(trained, config.optimizer, ranges.clone())?,
            None => AdamW::new(trained, config.optimizer)?,
        };
        let average = config.ema_decay.map(|_| copies(trained)).transpose()?;
        Ok(Self {
            checkpoint,
            compute,
            config,
            decoder,
            lora,
            optimizer,
            ranges,
            average,
            generator: None,
            recording: None,
        })
    }

    /// The variables that the optimizer updates, by name: the weights, or their adapters.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        self.lora.as_ref().map_or(self.decoder.variables(), Lora::variables)
    }

    pub fn generate(
        &mut self,
        requests: Vec<Request>,
        options: &Options,
        keep_tokens: usize,
        finished: &UnboundedSender<Completion>,
        cancel: &CancellationToken,
    ) -> Result<()> {
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
        Ok(())
    }

    pub fn logprobs(&self, tokens: &[Tokens], temperature: f64) -> Result<Vec<Vec<f32>>> {
        let recorded = |t: &Tokens| self.recording.as_ref()?.logprobs(&t.prompt, &t.completion, temperature);
        match tokens.iter().map(|t| recorded(t).map(<[f32]>::to_vec)).collect() {
            Some(known) => Ok(known),
            None => {
                let budget = self.config.micro_batch_tokens;
                self.compute.run(|| passes::logprobs(&self.decoder, tokens, temperature, budget))
            }
        }
    }

    /// The sums of some of a step's leaves.
    pub fn gradients(
        &mut self,
        batch: &UpdateBatch,
        leaves: Range<usize>,
        cancel: &CancellationToken,
    ) -> Result<Vec<(Range<usize>, LeafSum)>> {
        self.generator = None;
        let compute = self.compute.clone();
        compute.run(|| {
            let mut recording = self.recording.take();
            let mut tree = Tree::new(self.config.leaves);
            for index in leaves.clone() {
                let last = index + 1 == leaves.end;
                let recording = if last { recording.take() } else { recording.clone() };
                let leaf = Leaf { index, count: self.config.leaves };
                let sum = self.leaf(batch, leaf, cancel, recording)?;
                tree.push(index..index + 1, sum, LeafSum::add)?;
            }
            Ok(tree.into_sums())
        })
    }

    fn leaf(
        &self,
        batch: &UpdateBatch,
        leaf: Leaf,
        cancel: &CancellationToken,
        recording: Option<Recording>,
    ) -> Result<LeafSum> {
        let mut pass =
            Pass::new(&self.decoder, leaf, batch.temperature, self.config.micro_batch_tokens, cancel, recording);
        batch.objective.accumulate(&mut pass)?;
        let mut sum = LeafSum::of(&pass);
        let start = Instant::now();
        // A leaf without data has no gradients, which is no error where others have some.
        if leaf.count == 1 || !pass.gradients.is_empty() {
            let gradients = pass.gradients.complete(&self.decoder)?;
            sum.gradients = Some(match &self.lora {
                Some(lora) => lora.gradients(gradients)?,
                None => gradients,
            });
        }
        sum.times.optimizer += start.elapsed();
        Ok(sum)
    }

    /// Updates the member's elements of the weights by the gradients of a step, which are multiplied by `scale`. Returns copies
    /// of these elements where the member does not update all.
    pub fn update(
        &mut self,
        gradients: &BTreeMap<String, Tensor>,
        learning_rate: f64,
        scale: f64,
    ) -> Result<BTreeMap<String, Tensor>> {
        self.optimize(gradients, |optimizer, trained, gradients| {
            optimizer.step(trained, gradients, learning_rate, scale)
        })
    }

    /// [`Member::update`] by the gradients of the member's own elements, flat.
    pub fn update_shard(
        &mut self,
        gradients: &BTreeMap<String, Tensor>,
        learning_rate: f64,
        scale: f64,
    ) -> Result<BTreeMap<String, Tensor>> {
        self.optimize(gradients, |optimizer, trained, gradients| {
            optimizer.step_shard(trained, gradients, learning_rate, scale)
        })
    }

    /// Lets `step` update the trained variables by gradients on their device.
    fn optimize(
        &mut self,
        gradients: &BTreeMap<String, Tensor>,
        step: impl FnOnce(&mut AdamW, &BTreeMap<String, Var>, &BTreeMap<String, Tensor>) -> rehearsal_learn::Result<()>
        + Send,
    ) -> Result<BTreeMap<String, Tensor>> {
        let compute = self.compute.clone();
        compute.run(|| {
            let decoder = self.decoder.clone();
            let trained = self.lora.as_ref().map_or(decoder.variables(), Lora::variables);
            step(&mut self.optimizer, trained, &on_device(gradients, &self.compute.device)?)?;
            self.own_elements()
        })
    }

    /// Copies of the elements that the member updates, flat; none if it updates all.
    fn own_elements(&self) -> Result<BTreeMap<String, Tensor>> {
        let own = |(name, range): (&String, &Range<usize>)| {
            let whole = self.variables()[name].as_detached_tensor();
            Ok((name.clone(), whole.flatten_all()?.narrow(0, range.start, range.len())?.copy()?))
        };
        self.ranges.iter().flatten().map(own).collect()
    }

    /// Sets elements of a variable, from `start` on, that another member has updated.
    pub fn set_elements(&self, name: &str, start: usize, values: &Tensor) -> Result<()> {
        self.compute.run(|| {
            let variable = self.variables()[name].as_detached_tensor();
            Ok(variable.flatten_all()?.slice_set(&values.to_device(&self.compute.device)?, 0, start)?)
        })
    }

    /// Zeros in the shapes of the trained variables.
    pub fn zeros(&self) -> Result<BTreeMap<String, Tensor>> {
        let zeros = |(name, var): (&String, &Var)| Ok((name.clone(), var.zeros_like()?));
        self.variables().iter().map(zeros).collect()
    }

    /// Follows an update of the weights, when all elements are there: checks them, merges adapters, moves the average.
    pub fn updated(&mut self) -> Result<()> {
        let compute = self.compute.clone();
        compute.run(|| {
            let decoder = self.decoder.clone();
            let trained = self.lora.as_ref().map_or(decoder.variables(), Lora::variables);
            check_finite(trained.iter().map(|(name, var)| (name, var.as_detached_tensor())))?;
            if let Some(lora) = &self.lora {
                lora.apply(&self.checkpoint, &decoder)?;
            }
            if let (Some(average), Some(decay)) = (&mut self.average, self.config.ema_decay) {
                for (name, weight) in trained {
                    if let Some(entry) = average.get_mut(name) {
                        *entry = ema::update(entry, &weight.as_detached_tensor(), decay)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// The elements that the member updates; `None` for all.
    pub fn ranges(&self) -> Option<&Ranges> {
        self.ranges.as_ref()
    }

    /// The state of the member's optimizer.
    pub fn moments(&self) -> BTreeMap<String, Tensor> {
        self.optimizer.state()
    }

    /// The weights, with the state of an optimizer of all elements.
    pub fn snapshot(&self, version: u64, optimizer: BTreeMap<String, Tensor>) -> ModelSnapshot {
        let steps = self.optimizer.steps();
        ModelSnapshot::new(version, steps, self.variables(), self.average.as_ref(), optimizer)
    }

    /// A copy of the trained variables.
    pub fn weights(&self, version: u64) -> Result<ModelSnapshot> {
        let weights = self.compute.run(|| copies(self.variables()))?;
        Ok(ModelSnapshot::of_weights(version, weights))
    }

    pub fn restore(&mut self, snapshot: &ModelSnapshot) -> Result<()> {
        (self.generator, self.recording) = (None, None);
        snapshot.set_weights(self.variables())?;
        if let Some(lora) = &self.lora {
            lora.apply(&self.checkpoint, &self.decoder)?;
        }
        if let Some(average) = &mut self.average {
            for (name, entry) in average.iter_mut() {
                *entry = snapshot.average(name)?.to_device(&self.compute.device)?;
            }
        }
        Ok(self.optimizer.restore(snapshot.optimizer_steps, &snapshot.tensors)?)
    }

    /// Writes the averaged weights if there are any, else the weights, with adapters merged in and also beside them.
    pub fn export(&self, directory: &Path, dtype: DType) -> Result<()> {
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

    fn write(&self, directory: &Path, dtype: DType) -> Result<()> {
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
fn check_finite<'a>(weights: impl Iterator<Item = (&'a String, Tensor)>) -> Result<()> {
    let weights = weights.map(|(name, tensor)| (name.clone(), tensor)).collect();
    if global_norm(&weights)?.is_finite() { Ok(()) } else { Err(Error::Diverged) }
}

/// Copies of the variables' current values.
fn copies(variables: &BTreeMap<String, Var>) -> Result<Parameters> {
    variables.iter().map(|(name, var)| Ok((name.clone(), var.as_detached_tensor().copy()?))).collect()
}

/// The gradients on a device; those that are there already share storage.
fn on_device(gradients: &BTreeMap<String, Tensor>, device: &candle_core::Device) -> Result<BTreeMap<String, Tensor>> {
    gradients.iter().map(|(name, gradient)| Ok((name.clone(), gradient.to_device(device)?))).collect()
}
