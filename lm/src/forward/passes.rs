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

/// A forward pass with what its backward pass needs.
pub struct Forward<'a>(Trace<'a>);

enum Trace<'a> {
    Cpu(Box<pass::Trace<'a, Cpu>>),
    Gpu(Box<pass::Trace<'a, Gpu>>),
    Graph(Graph<'a>),
}

impl Decoder {
    /// Log-probabilities `[batch.scored()]` of the batch's targets at a temperature, without a graph.
    pub fn logprobs(&self, batch: &Batch, temperature: f64) -> Result<Tensor> {
        self.wants(HeadKind::Language)?;
        Ok(self.output(batch, temperature)?.narrow(0, 0, batch.scored())?)
    }

    /// Scores `[batch.rows()]` of a model with a score head, without a graph.
    pub fn values(&self, batch: &Batch) -> Result<Tensor> {
        self.wants(HeadKind::Score)?;
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

    /// Logits `[tokens, vocabulary]` after each token of one sequence, all at once: for short sequences.
    pub fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        self.wants(HeadKind::Language)?;
        let Some((last, rest)) = ids.split_last() else { return Err(Error::EmptyPrompt { id: 0 }) };
        // A batch has no row for the last token of a sequence, so the last token is repeated.
        let batch = Batch::new([Sequence { prompt: rest, completion: &[*last, *last] }]);
        self.check(&batch)?;
        let hidden = self.layers().norm.forward(&graph::hidden(self, &batch)?)?;
        self.bent(ops::linear(&hidden, &self.layers().head)?)
    }

    /// Log-probabilities of the batch's targets, with what [`Forward::backward`] needs.
    ///
    /// The model must be [trainable](Decoder::trainable).
    pub fn forward(&self, batch: &Batch, temperature: f64) -> Result<Forward<'_>> {
        self.wants(HeadKind::Language)?;
        self.traced(batch, temperature)
    }

    /// [`Decoder::forward`] on completions that the same weights have just generated: takes the activations from
    /// `recording`, which are the same bits as if they were computed again. Computes a batch that is not recorded as a whole.
    pub fn forward_recalled(&self, batch: &Batch, temperature: f64, recording: Recording) -> Result<Forward<'_>> {
        let trace = match machine(self) {
            Some(Machine::Cpu(cpu)) if self.recalls() => recording.trace(cpu, self, batch, temperature)?,
            _ => None,
        };
        match trace {
            Some(trace) => Ok(Forward(Trace::Cpu(Box::new(trace)))),
            None => self.forward(batch, temperature),
        }
    }

    /// Whether generation can record activations for a backward pass.
    pub(crate) fn recalls(&self) -> bool {
        let trained = self.trained().is_some() && self.dtype() == DType::F32 && !self.recomputes();
        trained && matches!(machine(self), Some(Machine::Cpu(_))) && self.wants(HeadKind::Language).is_ok()
    }

    /// Scores of the batch's rows, with what [`Forward::backward`] needs, for a trainable model with a score head.
    pub fn forward_values(&self, batch: &Batch) -> Result<Forward<'_>> {
        self.wants(HeadKind::Score)?;
        self.traced(batch, 1.0)
    }

    fn traced(&self, batch: &Batch, temperature: f64) -> Result<Forward<'_>> {
        let layers = self.trained().ok_or_else(|| Error::Config("the model is frozen; load it as trainable".into()))?;
        self.check(batch)?;
        Ok(Forward(match machine(self).filter(|_| self.dtype() == DType::F32) {
            Some(Machine::Cpu(cpu)) => Trace::Cpu(Box::new(pass::Trace::forward(cpu, self, batch, temperature)?)),
            Some(Machine::Gpu(gpu)) => Trace::Gpu(Box::new(pass::Trace::forward(gpu, self, batch, temperature)?)),
            None => Trace::Graph(Graph::forward(self, layers, batch, temperature)?),
        }))
    }
}

impl Forward<'_> {
    /// Log-probabilities `[batch.scored()]` (and as many entropies, where the batch asks for them), or scores
    /// `[batch.rows()]`, without history: an objective makes a [`Var`] of them and hands its gradient to
    /// [`Forward::backward`].
    pub fn output(&self) -> Tensor {
        match &self.0 {
            Trace::Cpu(trace) => trace.output().clone(),
            Trace::Gpu(trace) => trace.output().clone(),
            Trace::Graph(graph) => graph.output.detach(),
        }
    }

    /// Adds the gradient of an objective to `gradients`, given its gradient with respect to the output.
    pub fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        match self.0 {
            Trace::Cpu(trace) => Ok(trace.backward(grad, gradients)?),
            Trace::Gpu(trace) => Ok(trace.backward(grad, gradients)?),
            Trace::Graph(graph) => graph.backward(grad, gradients),
        }
    }
}
