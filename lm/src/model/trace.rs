//! Forward passes that keep activations, and their backward passes.
//!
//! Where [`crate::pass`] runs the decoder, it keeps the activations it needs. Elsewhere every block is a candle graph
//! of its own, from a variable to the block's output; the backward pass goes through the graphs from the last to the
//! first and drops each, with its activations, once its gradients are added up.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::{Batch, Decoder, HeadKind, Layers, Norm, Projection};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops;
use crate::pass::{self, Cpu, Machine, Recording};

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

    /// The gradient of one parameter, an f32 tensor to be added to in place; zeros at first.
    pub(crate) fn sum(&mut self, name: &str, like: &Tensor) -> candle_core::Result<Tensor> {
        if let Some(sum) = self.0.get(name) {
            return Ok(sum.clone());
        }
        let sum = Tensor::zeros(like.shape(), DType::F32, like.device())?;
        self.0.insert(name.to_string(), sum.clone());
        Ok(sum)
    }

    /// The gradients of a norm's weight and bias, to be added to.
    pub(crate) fn sums_of_norm(&mut self, norm: &Norm) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        self.sums(&norm.name, &norm.weight, norm.bias.as_ref())
    }

    /// The gradients of a projection's weight, in the parameter's own shape, and bias, to be added to.
    pub(crate) fn sums_of_projection(&mut self, p: &Projection) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        let weight = if p.turned { p.weight.t()? } else { p.weight.clone() };
        self.sums(&p.name, &weight, p.bias.as_ref())
    }

    fn sums(
        &mut self,
        name: &str,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        let bias = bias.map(|bias| self.sum(&format!("{name}.bias"), bias)).transpose()?;
        Ok((self.sum(&format!("{name}.weight"), weight)?, bias))
    }

    /// The gradients, one for each variable of the model. Fails if a variable has none.
    pub fn complete(self, decoder: &Decoder) -> Result<BTreeMap<String, Tensor>> {
        match decoder.variables().keys().find(|name| !self.0.contains_key(*name)) {
            Some(name) => Err(Error::NoGradient(name.clone())),
            None => Ok(self.0),
        }
    }
}

/// A forward pass with its activations, ready for the backward pass.
pub struct Forward<'a>(Trace<'a>);

enum Trace<'a> {
    Cpu(Box<pass::Trace<'a, Cpu>>),
    Gpu(Box<pass::Trace<'a, Gpu>>),
    Graph(Graph<'a>),
}

impl Decoder {
    /// Computes the log-probabilities of the batch's targets and keeps the activations for [`Forward::backward`].
    ///
    /// Fails if the model is not [trainable](Decoder::trainable) or has a score head.
    pub fn forward(&self, batch: &Batch, temperature: f64) -> Result<Forward<'_>> {
        self.require_head(HeadKind::Language)?;
        self.traced(batch, temperature)
    }

    /// [`Decoder::forward`] on completions that the same weights have just generated, with the activations that
    /// generation recorded: the same bits, without computing them again. If the recording does not have the whole
    /// batch, this is [`Decoder::forward`].
    pub fn forward_recalled(&self, batch: &Batch, temperature: f64, recording: Recording) -> Result<Forward<'_>> {
        let trace = match pass::machine(self) {
            Some(Machine::Cpu(cpu)) if self.can_record() => {
                pass::Trace::recall(cpu, self, batch, temperature, recording)?
            }
            _ => None,
        };
        match trace {
            Some(trace) => Ok(Forward(Trace::Cpu(Box::new(trace)))),
            None => self.forward(batch, temperature),
        }
    }

    /// Whether generation can record activations for a backward pass.
    pub(crate) fn can_record(&self) -> bool {
        let trained = self.trained.is_some() && self.dtype() == DType::F32 && !self.recomputes();
        trained && matches!(pass::machine(self), Some(Machine::Cpu(_))) && self.require_head(HeadKind::Language).is_ok()
    }

    /// Computes the scores of the batch's rows and keeps the activations for [`Forward::backward`].
    ///
    /// Fails if the model is not [trainable](Decoder::trainable) or has no score head.
    pub fn forward_values(&self, batch: &Batch) -> Result<Forward<'_>> {
        self.require_head(HeadKind::Score)?;
        self.traced(batch, 1.0)
    }

    fn traced(&self, batch: &Batch, temperature: f64) -> Result<Forward<'_>> {
        let layers = self.trained.as_ref().ok_or_else(|| {
            Error::Config("the model is frozen, so it has no backward pass; load it as trainable".into())
        })?;
        self.check(batch)?;
        Ok(Forward(match pass::machine(self).filter(|_| self.dtype() == DType::F32) {
            Some(Machine::Cpu(cpu)) => Trace::Cpu(Box::new(pass::Trace::forward(cpu, self, batch, temperature)?)),
            Some(Machine::Gpu(gpu)) => Trace::Gpu(Box::new(pass::Trace::forward(gpu, self, batch, temperature)?)),
            None => Trace::Graph(Graph::forward(self, layers, batch, temperature)?),
        }))
    }
}

impl Forward<'_> {
    /// Log-probabilities `[batch.scored()]`, followed by as many entropies if the batch has them, or scores
    /// `[batch.rows()]`, without gradient tracking. An objective makes a [`Var`] of them and passes its gradient to
    /// [`Forward::backward`].
    pub fn output(&self) -> Tensor {
        match &self.0 {
            Trace::Cpu(trace) => trace.output().clone(),
            Trace::Gpu(trace) => trace.output().clone(),
            Trace::Graph(graph) => graph.output.detach(),
        }
    }

    /// Runs the backward pass: adds the gradients of an objective with respect to the parameters to `gradients`, given
    /// its gradient with respect to the output.
    pub fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        match self.0 {
            Trace::Cpu(trace) => Ok(trace.backward(grad, gradients)?),
            Trace::Gpu(trace) => Ok(trace.backward(grad, gradients)?),
            Trace::Graph(graph) => graph.backward(grad, gradients),
        }
    }
}

/// Candle graphs of a forward pass: one for the embedding, one per block, one for the head.
struct Graph<'a> {
    decoder: &'a Decoder,
    embedded: Tensor,
    /// Input and output of every block.
    segments: Vec<(Var, Tensor)>,
    head_input: Var,
    output: Tensor,
}

impl<'a> Graph<'a> {
    fn forward(decoder: &'a Decoder, layers: &Layers, batch: &Batch, temperature: f64) -> Result<Self> {
        let embedded = decoder.embedded(layers, batch)?;
        let attention = decoder.attention(batch);
        let mut x = embedded.detach();
        let mut segments = Vec::with_capacity(layers.blocks.len());
        for (layer, block) in layers.blocks.iter().enumerate() {
            let input = Var::from_tensor(&x)?;
            let output = block.forward(&input, &decoder.layer(layer, batch.positions()), |q, k, v| {
                ops::attention(q, k, v, &attention(layer))
            })?;
            x = output.detach();
            segments.push((input, output));
        }
        let head_input = Var::from_tensor(&x)?;
        let output = decoder.head(layers, &head_input, batch, temperature)?;
        Ok(Self { decoder, embedded, segments, head_input, output })
    }

    fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let decoder = self.decoder;
        // In the order of names, so that results do not depend on the order of a hash map.
        let mut collect = |grads: &mut GradStore| -> Result<()> {
            for (name, variable) in decoder.variables.iter() {
                if let Some(gradient) = grads.remove(variable) {
                    gradients.add(name, gradient)?;
                }
            }
            Ok(())
        };
        let input_of = |grads: &mut GradStore, input: &Var| {
            grads.remove(input).ok_or_else(|| Error::NoGradient("(activations)".into()))
        };
        let mut grads = seeded(&self.output, grad)?;
        let mut upstream = input_of(&mut grads, &self.head_input)?;
        collect(&mut grads)?;
        drop((self.output, self.head_input));
        for (input, output) in self.segments.into_iter().rev() {
            let mut grads = seeded(&output, &upstream)?;
            upstream = input_of(&mut grads, &input)?;
            collect(&mut grads)?;
        }
        collect(&mut seeded(&self.embedded, &upstream)?)
    }
}

/// Gradients of `Σ output * upstream`: candle's backward pass starts from a scalar.
fn seeded(output: &Tensor, upstream: &Tensor) -> Result<GradStore> {
    Ok((output * upstream.detach())?.sum_all()?.backward()?)
}
