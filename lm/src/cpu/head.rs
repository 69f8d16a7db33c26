//! The final norm and what stands on it, on the rows that are read.

use candle_core::{DType, Result};
use half::bf16;

use super::gather;
use super::weights::{vector, with_views};
use crate::kernels::gemm::{Element, Precision, View};
use crate::kernels::head::{self, Targets};
use crate::kernels::math::dot;
use crate::kernels::norm;
use crate::model::{Batch, Decoder, Gradients, HeadKind};

/// A pass through the head, with what the way back needs.
pub struct Head {
    /// The rows of the residual stream that are read, before and after the norm.
    x: Vec<f32>,
    hidden: Vec<f32>,
    /// Log-probabilities of the targets, followed by the entropies of the rows if they were asked for; or scores of the
    /// rows.
    pub output: Vec<f32>,
    lse: Vec<f32>,
    temperature: f32,
}

impl Head {
    /// Reads the batch's rows of the residual stream.
    pub fn forward(decoder: &Decoder, batch: &Batch, stream: &[f32], temperature: f64) -> Result<Self> {
        let (arch, layers) = (decoder.architecture(), decoder.layers());
        let mut x = Vec::new();
        let stream = View::new(stream, batch.tokens(), arch.hidden);
        gather(stream, batch.rows.iter().map(|&r| r as usize), &mut x);
        let mut hidden = vec![0.0; x.len()];
        norm::rms_norm(&x, &vector(&layers.norm.weight)?, arch.norm_eps as f32, &mut hidden);
        let temperature = temperature as f32;
        let (output, lse) = match arch.head {
            HeadKind::Score => {
                let weight = vector(&layers.head.flatten_all()?)?;
                (hidden.chunks_exact(arch.hidden).map(|row| dot(row, &weight)).collect(), Vec::new())
            }
            HeadKind::Language => {
                let run = Run { hidden: &hidden, batch, temperature, precision: decoder.precision() };
                match layers.head.dtype() {
                    DType::BF16 => with_views::<bf16, _>(&[&layers.head], |w| Ok(run.forward(w[0])))?,
                    _ => with_views::<f32, _>(&[&layers.head], |w| Ok(run.forward(w[0])))?,
                }
            }
        };
        Ok(Self { x, hidden, output, lse, temperature })
    }

    /// The gradient of the residual stream.
    pub fn backward(
        &self,
        decoder: &Decoder,
        batch: &Batch,
        grad: &[f32],
        gradients: &mut Gradients,
    ) -> Result<Vec<f32>> {
        let (arch, layers) = (decoder.architecture(), decoder.layers());
        let d_hidden = gradients.with(arch.head_name(), &layers.head, |sum| match arch.head {
            HeadKind::Score => Ok(self.score_backward(&vector(&layers.head.flatten_all()?)?, grad, sum)),
            HeadKind::Language => {
                let targets = Targets { tokens: &batch.targets, temperature: self.temperature };
                let (grad, d_entropy) = grad.split_at(batch.scored());
                let entropy = batch.entropy.then(|| (&self.output[batch.scored()..], d_entropy));
                let saved = head::Saved { hidden: &self.hidden, lse: &self.lse, grad, entropy };
                with_views::<f32, _>(&[&layers.head], |w| {
                    Ok(head::backward(&saved, w[0], targets, sum, decoder.precision()))
                })
            }
        })?;
        let mut dx = vec![0.0; self.x.len()];
        gradients.with("model.norm.weight", &layers.norm.weight, |dw| {
            let weight = vector(&layers.norm.weight)?;
            norm::rms_norm_backward(&self.x, &weight, arch.norm_eps as f32, &d_hidden, &mut dx, dw);
            Ok(())
        })?;
        let mut stream = vec![0.0; batch.tokens() * arch.hidden];
        for (&row, dx) in batch.rows.iter().zip(dx.chunks_exact(arch.hidden)) {
            let at = row as usize * arch.hidden;
            for (sum, x) in stream[at..at + arch.hidden].iter_mut().zip(dx) {
                *sum += x;
            }
        }
        Ok(stream)
    }

    /// The way back through `score = hidden · weight`.
    fn score_backward(&self, weight: &[f32], grad: &[f32], d_weight: &mut [f32]) -> Vec<f32> {
        let mut d_hidden = vec![0.0; self.hidden.len()];
        let rows = self.hidden.chunks_exact(weight.len()).zip(d_hidden.chunks_exact_mut(weight.len()));
        for ((hidden, d_hidden), &grad) in rows.zip(grad) {
            for i in 0..weight.len() {
                d_hidden[i] = grad * weight[i];
                d_weight[i] = grad.mul_add(hidden[i], d_weight[i]);
            }
        }
        d_hidden
    }
}

/// A forward pass through the language head.
struct Run<'a> {
    hidden: &'a [f32],
    batch: &'a Batch,
    temperature: f32,
    precision: Precision,
}

impl Run<'_> {
    /// What is asked for, and the log-sum-exps.
    fn forward<E: Element>(&self, weight: View<'_, E>) -> (Vec<f32>, Vec<f32>) {
        let targets = Targets { tokens: &self.batch.targets, temperature: self.temperature };
        let (mut output, lse) = head::logprobs(self.hidden, weight, targets, self.precision);
        if self.batch.entropy {
            output.extend(head::entropies(self.hidden, weight, &lse, self.temperature, self.precision));
        }
        (output, lse)
    }
}
