//! The final norm and the output head, on the rows that are read.

use candle_core::{Result, Tensor};

use super::block::norm;
use super::ops::{Answers, Norm, Ops, Question};
use crate::model::{Batch, Decoder, Gradients, HeadKind};

/// Forward pass of final norm and head, with what its backward pass needs.
pub struct Head<O: Ops> {
    norm: Norm<O::Vector>,
    /// The rows of the residual stream that are read, before and after the norm.
    x: O::Buffer,
    hidden: O::Buffer,
    output: HeadOutput<O::LogSums>,
    temperature: f32,
}

/// Output of a language-model head, or of a score head.
enum HeadOutput<L> {
    Logprobs(Answers<L>),
    Scores(Tensor),
}

/// What a language-model head computes for a batch.
fn question<'a>(decoder: &Decoder, batch: &'a Batch, temperature: f32) -> Question<'a> {
    let softcap = decoder.architecture().final_softcap.map(|cap| cap as f32);
    Question { targets: &batch.targets, temperature, softcap, entropy: batch.entropy }
}

impl<O: Ops> Head<O> {
    /// Runs the head on the batch's rows of the residual stream.
    pub fn forward(ops: &O, decoder: &Decoder, batch: &Batch, stream: &O::Buffer, temperature: f64) -> Result<Self> {
        let mut x = ops.wide();
        ops.gather(stream, decoder.architecture().hidden, &batch.rows, &mut x)?;
        Self::on(ops, decoder, batch, x, temperature, None)
    }

    /// Runs the head on rows `x`; `known` is the language-model head's output, if it was recorded.
    pub fn on(
        ops: &O,
        decoder: &Decoder,
        batch: &Batch,
        x: O::Buffer,
        temperature: f64,
        known: Option<Answers<O::LogSums>>,
    ) -> Result<Self> {
        let (arch, layers) = (decoder.architecture(), decoder.layers());
        let (mut hidden, norm) = (ops.narrow(), norm(ops, &layers.norm)?);
        ops.norm(&x, &norm, &mut hidden)?;
        let temperature = temperature as f32;
        let output = match (arch.head, known) {
            (HeadKind::Score, _) => HeadOutput::Scores(ops.scores(&hidden, &layers.head)?),
            (HeadKind::Language, Some(answers)) => HeadOutput::Logprobs(answers),
            (HeadKind::Language, None) => {
                HeadOutput::Logprobs(ops.answer(&hidden, &layers.head, question(decoder, batch, temperature))?)
            }
        };
        Ok(Self { norm, x, hidden, output, temperature })
    }

    /// Log-probabilities of the targets, followed by the entropies of the rows, if computed; or scores of the rows.
    pub fn output(&self) -> &Tensor {
        match &self.output {
            HeadOutput::Logprobs(answers) => &answers.output,
            HeadOutput::Scores(scores) => scores,
        }
    }

    /// Fills `upstream` with the gradient of the residual stream, and adds those of the head's and the norm's
    /// parameters to `gradients`.
    pub fn backward(
        self,
        ops: &O,
        decoder: &Decoder,
        batch: &Batch,
        grad: &Tensor,
        gradients: &mut Gradients,
        upstream: &mut O::Buffer,
    ) -> Result<()> {
        let (arch, layers) = (decoder.architecture(), decoder.layers());
        let sum = gradients.sum(arch.head_name(), &layers.head)?;
        let (mut d_hidden, mut dx) = (ops.wide(), ops.wide());
        match &self.output {
            HeadOutput::Scores(_) => ops.scores_back(&self.hidden, &layers.head, grad, &mut d_hidden, &sum)?,
            HeadOutput::Logprobs(answers) => {
                let question = question(decoder, batch, self.temperature);
                ops.answer_back(&self.hidden, &layers.head, question, answers, grad, &mut d_hidden, &sum)?;
            }
        }
        ops.zero(&mut dx, batch.rows.len() * arch.hidden)?;
        let (weight, bias) = gradients.sums_of_norm(&layers.norm)?;
        ops.norm_back(&self.x, &self.norm, &d_hidden, &mut dx, (&weight, bias.as_ref()))?;
        ops.scatter(&dx, arch.hidden, &batch.rows, batch.tokens(), upstream)
    }
}
