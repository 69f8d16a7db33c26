//! Passes of a decoder, on whatever runs them: without gradients, or as a [`Forward`] that keeps what its backward pass needs.

use candle_core::{DType, Tensor};

use super::graph::{self, Graph};
use super::machine::{Machine, machine};
use crate::cpu::{Cpu, Recording};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::model::{Batch, Decoder, Gradients, HeadKind, Sequence};
use crate::ops;
use crate::pass;

/// A forward pass with its activations, ready for the backward pass.
pub struct Forward<'a>(Trace<'a>);

enum Trace<'a> {
    Cpu(Box<pass::Trace<'a, Cpu>>),
    Gpu(Box<pass::Trace<'a, Gpu>>),
    Graph(Graph<'a>),
}

impl Decoder {
    /// Log-probabilities `[batch.scored()]` of the batch's targets at a temperature, without gradients.
    pub fn logprobs(&self, batch: &Batch, temperature: f64) -> Result<Tensor> {
        self.require_head(HeadKind::Language)?;
        Ok(self.output(batch, temperature)?.narrow(0, 0, batch.scored())?)
    }

    /// Scores `[batch.rows()]` of a model with a score head, without gradients.
    pub fn values(&self, batch: &Batch) -> Result<Tensor> {
        self.require_head(HeadKind::Score)?;
        self.output(batch, 1.0)
    }

    fn output(&self, batch: &Batch, temperature: f64) -> Result<Tensor> {
        self.check(batch)?;
        match machine(self) {
            Some(Machine::Cpu(cpu)) => return Ok(pass::output(&cpu, self, batch, temperature)?),
            Some(Machine::Gpu(gpu)) => return Ok(pass::output(&gpu, self, batch, temperature)?),
            None => {}
        }
        let x = graph::hidden(self, batch)?;
        graph::head(self, self.layers(), &x, batch, temperature)
    }

    /// Logits `[tokens, vocab]` after each token of one sequence. All are held at once, so this is for short sequences.
    pub fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        self.require_head(HeadKind::Language)?;
        let Some((last, rest)) = ids.split_last() else { return Err(Error::EmptyPrompt { id: 0 }) };
        // A batch leaves out the last token of a completion, so it is repeated.
        let batch = Batch::new([Sequence { prompt: rest, completion: &[*last, *last] }]);
        self.check(&batch)?;
        let hidden = self.layers().norm.forward(&graph::hidden(self, &batch)?)?;
        self.softcapped(ops::linear(&hidden, &self.layers().head)?)
    }

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
        let trace = match machine(self) {
            Some(Machine::Cpu(cpu)) if self.can_record() => recording.trace(cpu, self, batch, temperature)?,
            _ => None,
        };
        match trace {
            Some(trace) => Ok(Forward(Trace::Cpu(Box::new(trace)))),
            None => self.forward(batch, temperature),
        }
    }

    /// Whether generation can record activations for a backward pass.
    pub(crate) fn can_record(&self) -> bool {
        let trained = self.trained().is_some() && self.dtype() == DType::F32 && !self.recomputes();
        trained && matches!(machine(self), Some(Machine::Cpu(_))) && self.require_head(HeadKind::Language).is_ok()
    }

    /// Computes the scores of the batch's rows and keeps the activations for [`Forward::backward`].
    ///
    /// Fails if the model is not [trainable](Decoder::trainable) or has no score head.
    pub fn forward_values(&self, batch: &Batch) -> Result<Forward<'_>> {
        self.require_head(HeadKind::Score)?;
        self.traced(batch, 1.0)
    }

    fn traced(&self, batch: &Batch, temperature: f64) -> Result<Forward<'_>> {
        let layers = self.trained().ok_or_else(|| {
            Error::Config("the model is frozen, so it has no backward pass; load it as trainable".into())
        })?;
        self.check(batch)?;
        Ok(Forward(match machine(self).filter(|_| self.dtype() == DType::F32) {
            Some(Machine::Cpu(cpu)) => Trace::Cpu(Box::new(pass::Trace::forward(cpu, self, batch, temperature)?)),
            Some(Machine::Gpu(gpu)) => Trace::Gpu(Box::new(pass::Trace::forward(gpu, self, batch, temperature)?)),
            None => Trace::Graph(Graph::forward(self, layers, batch, temperature)?),
        }))
    }
}

impl Forward<'_> {
    /// Log-probabilities `[batch.scored()]`, followed by as many entropies if the batch has them, or scores
    /// `[batch.rows()]`, without gradient tracking. An objective makes a `Var` of them and passes its gradient to
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
