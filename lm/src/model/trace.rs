//! Forward with a memory, and the backward pass through it, one block at a time.
//!
//! On the CPU the [kernels](crate::cpu) keep what they need. Elsewhere each block is a candle graph of its own from a
//! variable to its output; the backward pass takes the graphs from the last to the first and drops each as soon as
//! its gradients are added up, so activations are freed on the way.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::{Batch, Decoder, Layers};
use crate::cpu;
use crate::error::{Error, Result};
use crate::ops::with_floats_mut;

/// Gradients by parameter name, summed over micro-batches.
#[derive(Default)]
pub struct Gradients(BTreeMap<String, Tensor>);

impl Gradients {
    fn add(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(name) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.0.insert(name.to_string(), sum);
        Ok(())
    }

    /// Runs `f` on the sum of one parameter's gradients, on the CPU in f32, for it to add to.
    pub(crate) fn with<T>(
        &mut self,
        name: &str,
        like: &Tensor,
        f: impl FnOnce(&mut [f32]) -> candle_core::Result<T>,
    ) -> candle_core::Result<T> {
        if !self.0.contains_key(name) {
            self.0.insert(name.to_string(), Tensor::zeros(like.shape(), DType::F32, like.device())?);
        }
        with_floats_mut(&self.0[name], f)
    }

    /// The gradients, one for each variable of the model; a variable without one is an error.
    pub fn complete(self, decoder: &Decoder) -> Result<BTreeMap<String, Tensor>> {
        match decoder.variables().keys().find(|name| !self.0.contains_key(*name)) {
            Some(name) => Err(Error::NoGradient(name.clone())),
            None => Ok(self.0),
        }
    }
}

/// A forward pass that can be gone back through.
pub struct Forward<'a>(Trace<'a>);

enum Trace<'a> {
    Cpu { trace: Box<cpu::Trace<'a>>, logprobs: Tensor },
    Graph(Graph<'a>),
}

impl Decoder {
    /// Log-probabilities of the batch's targets, with what [`Forward::backward`] needs.
    ///
    /// The model must be [trainable](Decoder::trainable).
    pub fn forward(&self, batch: &Batch, temperature: f64) -> Result<Forward<'_>> {
        let layers =
            self.trained.as_ref().ok_or_else(|| Error::Config("the model is frozen; load it as trainable".into()))?;
        self.check(batch)?;
        Ok(Forward(if cpu::serves(self) && self.dtype() == DType::F32 {
            let trace = cpu::Trace::forward(self, batch, temperature)?;
            let logprobs = Tensor::new(trace.logprobs(), self.device())?;
            Trace::Cpu { trace: Box::new(trace), logprobs }
        } else {
            Trace::Graph(Graph::forward(self, layers, batch, temperature)?)
        }))
    }
}

impl Forward<'_> {
    /// Log-probabilities `[batch.scored()]`, without history: an objective makes a [`Var`] of them and
    /// hands its gradient to [`Forward::backward`].
    pub fn logprobs(&self) -> Tensor {
        match &self.0 {
            Trace::Cpu { logprobs, .. } => logprobs.clone(),
            Trace::Graph(graph) => graph.logprobs.detach(),
        }
    }

    /// Adds the gradient of an objective to `gradients`, given its gradient with respect to the log-probabilities.
    pub fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        match self.0 {
            Trace::Cpu { trace, .. } => Ok(trace.backward(&grad.to_dtype(DType::F32)?.to_vec1::<f32>()?, gradients)?),
            Trace::Graph(graph) => graph.backward(grad, gradients),
        }
    }
}

/// Graphs of candle's, one a block.
struct Graph<'a> {
    decoder: &'a Decoder,
    ids: Tensor,
    /// Input and output of every block.
    segments: Vec<(Var, Tensor)>,
    head_input: Var,
    logprobs: Tensor,
}

impl<'a> Graph<'a> {
    fn forward(decoder: &'a Decoder, layers: &Layers, batch: &Batch, temperature: f64) -> Result<Self> {
        let context = decoder.context(batch)?;
        let mut x = layers.embed.detach().index_select(&context.ids, 0)?;
        let mut segments = Vec::with_capacity(layers.blocks.len());
        for block in &layers.blocks {
            let input = Var::from_tensor(&x)?;
            let output = block.forward(&input, &context)?;
            x = output.detach();
            segments.push((input, output));
        }
        let head_input = Var::from_tensor(&x)?;
        let logprobs = decoder.head(layers, &head_input, batch, temperature)?;
        Ok(Self { decoder, ids: context.ids, segments, head_input, logprobs })
    }

    fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let decoder = self.decoder;
        let mut collect = |mut grads: GradStore, input: &Var| -> Result<Tensor> {
            let upstream = grads.remove(input).ok_or_else(|| Error::NoGradient("(activations)".into()))?;
            // In the order of names, so that nothing depends on the order of a hash map.
            for (name, variable) in decoder.variables.iter() {
                if let Some(gradient) = grads.remove(variable) {
                    gradients.add(name, gradient)?;
                }
            }
            Ok(upstream)
        };
        let mut upstream = collect(seeded(&self.logprobs, grad)?, &self.head_input)?;
        drop((self.logprobs, self.head_input));
        for (input, output) in self.segments.into_iter().rev() {
            upstream = collect(seeded(&output, &upstream)?, &input)?;
        }
        let embed = &self.decoder.variables["model.embed_tokens.weight"];
        let scattered = embed.as_detached_tensor().zeros_like()?.index_add(&self.ids, &upstream, 0)?;
        gradients.add("model.embed_tokens.weight", scattered)
    }
}

/// Gradients of `Σ output * upstream`: candle starts from a scalar.
fn seeded(output: &Tensor, upstream: &Tensor) -> Result<GradStore> {
    Ok((output * upstream.detach())?.sum_all()?.backward()?)
}
