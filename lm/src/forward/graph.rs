//! Passes as candle graphs, for devices and types without kernels of this project.
//!
//! For training each block is a graph of its own, from a variable to the block's output. The backward pass takes the
//! graphs from the last to the first and drops each once its gradients are added, so that activations are freed early.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::error::{Error, Result};
use crate::model::{Batch, Decoder, Gradients, HeadKind, Layers};
use crate::ops;

/// Output of the last block `[tokens, hidden]`, without gradients.
pub fn hidden(decoder: &Decoder, batch: &Batch) -> Result<Tensor> {
    let layers = decoder.layers();
    let mut x = decoder.embedded(layers, batch)?;
    let attention = decoder.attention(batch);
    for (layer, block) in layers.blocks.iter().enumerate() {
        x = block.forward(&x, &decoder.layer(layer, batch.positions()), |q, k, v| {
            ops::attention(q, k, v, &attention(layer))
        })?;
    }
    Ok(x)
}

/// Output of the head, given the output `x` of the last block: log-probabilities of the batch's targets, or scores.
pub fn head(decoder: &Decoder, layers: &Layers, x: &Tensor, batch: &Batch, temperature: f64) -> Result<Tensor> {
    let rows = Tensor::new(batch.rows.as_slice(), x.device())?;
    // Only the rows that are read are normalised.
    let hidden = layers.norm.forward(&x.index_select(&rows, 0)?)?;
    let logits = ops::linear(&hidden, &layers.head)?;
    Ok(match decoder.architecture().head {
        HeadKind::Score => logits.squeeze(1)?,
        HeadKind::Language => ops::logprobs(&decoder.softcapped(logits)?, &batch.targets, temperature, batch.entropy)?,
    })
}

/// Candle graphs of a forward pass: one for the embedding, one per block, one for the head.
pub struct Graph<'a> {
    decoder: &'a Decoder,
    embedded: Tensor,
    /// Input and output of every block.
    segments: Vec<(Var, Tensor)>,
    head_input: Var,
    pub output: Tensor,
}

impl<'a> Graph<'a> {
    pub fn forward(decoder: &'a Decoder, layers: &Layers, batch: &Batch, temperature: f64) -> Result<Self> {
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
        let output = head(decoder, layers, &head_input, batch, temperature)?;
        Ok(Self { decoder, embedded, segments, head_input, output })
    }

    pub fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let decoder = self.decoder;
        // In the order of names, so that results do not depend on the order of a hash map.
        let mut collect = |grads: &mut GradStore| -> Result<()> {
            for (name, variable) in decoder.variables() {
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
