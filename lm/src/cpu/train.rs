//! A whole pass for training: forward with activations kept (or computed again), and the way back.

use candle_core::{DType, Result, Tensor};
use half::bf16;

use super::block::{Activations, Buffers, Kept, Rows};
use super::gather;
use super::head::Head;
use super::weights::{PackedBlock, gate, pack_into, vector, with_views};
use crate::kernels::attention::{self, Saved};
use crate::kernels::gemm::{Packed, Precision, View, gemm};
use crate::kernels::rope::rotate;
use crate::kernels::{norm, swiglu};
use crate::model::{Batch, Block, Decoder, Gradients, Projection};

/// Log-probabilities of a batch's targets, or scores of its rows, nothing kept.
pub fn output(decoder: &Decoder, batch: &Batch, temperature: f64) -> Result<Vec<f32>> {
    let (rows, mut b) = (Rows::new(decoder, &batch.positions), Buffers::default());
    embed(decoder, batch, &mut b.x)?;
    let mut packed = PackedBlock::empty(decoder.precision());
    for block in &decoder.layers().blocks {
        pass(&mut packed, block, batch, &rows, &mut b)?;
    }
    Ok(Head::forward(decoder, batch, &b.x, temperature)?.output)
}

fn embed(decoder: &Decoder, batch: &Batch, x: &mut Vec<f32>) -> Result<()> {
    lookup(&decoder.layers().embed, batch.ids.iter().map(|&id| id as usize), x)
}

/// Rows of a table as f32.
pub fn lookup(table: &Tensor, rows: impl ExactSizeIterator<Item = usize>, out: &mut Vec<f32>) -> Result<()> {
    if table.dtype() == DType::BF16 {
        with_views::<bf16, _>(&[table], |t| {
            gather(t[0], rows, out);
            Ok(())
        })
    } else {
        with_views::<f32, _>(&[table], |t| {
            gather(t[0], rows, out);
            Ok(())
        })
    }
}

/// What a block keeps: its activations, or its input alone, to run again.
enum Memory {
    Whole(Box<Activations>),
    Input(Kept),
}

/// A forward pass that can be gone back through.
pub struct Trace<'a> {
    decoder: &'a Decoder,
    batch: Batch,
    blocks: Vec<Memory>,
    head: Head,
    buffers: Buffers,
    packed: PackedBlock,
}

impl<'a> Trace<'a> {
    /// Runs a batch through a trainable decoder.
    pub fn forward(decoder: &'a Decoder, batch: &Batch, temperature: f64) -> Result<Self> {
        let mut b = Buffers::default();
        let rows = Rows::new(decoder, &batch.positions);
        embed(decoder, batch, &mut b.x)?;
        let mut blocks = Vec::with_capacity(decoder.layers().blocks.len());
        let mut packed = PackedBlock::empty(decoder.precision());
        for block in &decoder.layers().blocks {
            blocks.push(if decoder.recomputes() {
                let input = Kept::copy(&b.x, Precision::F32);
                pass(&mut packed, block, batch, &rows, &mut b)?;
                Memory::Input(input)
            } else {
                Memory::Whole(Box::new(pass_keeping(&mut packed, block, batch, &rows, &mut b)?))
            });
        }
        let head = Head::forward(decoder, batch, &b.x, temperature)?;
        Ok(Self { decoder, batch: batch.clone(), blocks, head, buffers: b, packed })
    }

    /// Log-probabilities of the batch's targets, or scores of its rows.
    pub fn output(&self) -> &[f32] {
        &self.head.output
    }

    /// Adds the gradient of an objective, given its gradient with respect to the output.
    pub fn backward(self, grad: &[f32], gradients: &mut Gradients) -> Result<()> {
        let Self { decoder, batch, blocks, head, mut buffers, mut packed } = self;
        let rows = Rows::new(decoder, &batch.positions);
        let mut upstream = head.backward(decoder, &batch, grad, gradients)?;
        drop(head);
        let mut scratch = Scratch::new(decoder.precision());
        for (index, (block, memory)) in decoder.layers().blocks.iter().zip(blocks).enumerate().rev() {
            let kept = match memory {
                Memory::Whole(kept) => *kept,
                Memory::Input(x) => {
                    x.restore(&mut buffers.x);
                    pass_keeping(&mut packed, block, &batch, &rows, &mut buffers)?
                }
            };
            let mut way = Way { batch: &batch, rows: &rows, index, gradients: &mut *gradients };
            way.back(block, kept, &mut upstream, &mut scratch)?;
        }
        let width = decoder.architecture().hidden;
        gradients.with("model.embed_tokens.weight", &decoder.layers().embed, |table| {
            for (&id, row) in batch.ids.iter().zip(upstream.chunks_exact(width)) {
                let at = id as usize * width;
                for (sum, x) in table[at..at + width].iter_mut().zip(row) {
                    *sum += x;
                }
            }
            Ok(())
        })
    }
}

/// Carries the residual stream through a block.
fn pass(packed: &mut PackedBlock, block: &Block, batch: &Batch, rows: &Rows<'_>, b: &mut Buffers) -> Result<()> {
    packed.fill(block)?;
    let mut lse = vec![0.0; batch.tokens() * rows.heads.queries];
    packed.forward(rows, b, |qkv, out| attention::forward(qkv, &batch.families, &rows.heads, out, &mut lse));
    Ok(())
}

/// [`pass`], with what the way back needs.
fn pass_keeping(
    packed: &mut PackedBlock,
    block: &Block,
    batch: &Batch,
    rows: &Rows<'_>,
    b: &mut Buffers,
) -> Result<Activations> {
    packed.fill(block)?;
    Ok(packed.forward_keeping(rows, b, |qkv, out, lse| {
        attention::forward(qkv, &batch.families, &rows.heads, out, lse);
    }))
}

/// Buffers of the way back.
struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    gate_up: Vec<f32>,
    mlp: Vec<f32>,
    grad: Vec<f32>,
    wide: Vec<f32>,
    /// The input of the products whose weight gradients are being summed.
    input: Packed,
    /// Weights of the products that lead back to the input.
    down: Packed,
}

impl Scratch {
    fn new(precision: Precision) -> Self {
        let empty = Vec::new;
        Self {
            x: empty(),
            normed: empty(),
            gate_up: empty(),
            mlp: empty(),
            grad: empty(),
            wide: empty(),
            input: Packed::empty(precision),
            down: Packed::empty(precision),
        }
    }
}

/// The way back through one block.
struct Way<'a> {
    batch: &'a Batch,
    rows: &'a Rows<'a>,
    index: usize,
    gradients: &'a mut Gradients,
}

impl Way<'_> {
    /// Turns `upstream`, the gradient of the block's output, into that of its input.
    fn back(&mut self, block: &Block, kept: Activations, upstream: &mut [f32], s: &mut Scratch) -> Result<()> {
        let rows = self.rows;
        let Activations { x, qkv, attended, lse, middle, gate_up } = kept;

        // Down projection and SwiGLU.
        gate_up.restore(&mut s.gate_up);
        let width = s.gate_up.len() / rows.positions.len() / 2;
        s.mlp.resize(s.gate_up.len() / 2, 0.0);
        swiglu::swiglu(&s.gate_up, width, &mut s.mlp);
        self.weights(&[("mlp.down_proj", &block.down)], upstream, &s.mlp, &mut s.input)?;
        inputs(&[&block.down], upstream, &mut s.mlp, &mut s.down)?;
        swiglu::swiglu_backward(&mut s.gate_up, width, &s.mlp);

        // Gate and up projections and their norm.
        middle.restore(&mut s.x);
        let post_norm = self.normalise(&s.x, &block.post_norm.weight, &mut s.normed)?;
        let gate = gate(block)?;
        let parts = [("mlp.gate_proj", gate), ("mlp.up_proj", &block.up)];
        self.weights(&parts, &s.gate_up, &s.normed, &mut s.input)?;
        inputs(&[gate, &block.up], &s.gate_up, &mut s.grad, &mut s.down)?;
        self.norm("post_attention_layernorm", &block.post_norm.weight, &post_norm, &s.x, &s.grad, upstream)?;

        // Output projection, attention and rotation.
        attended.restore(&mut s.x);
        self.weights(&[("self_attn.o_proj", &block.o)], upstream, &s.x, &mut s.input)?;
        inputs(&[&block.o], upstream, &mut s.grad, &mut s.down)?;
        qkv.restore(&mut s.gate_up);
        s.wide.resize(s.gate_up.len(), 0.0);
        let saved = Saved { qkv: &s.gate_up, out: &s.x, lse: &lse, grad: &s.grad };
        attention::backward(saved, &self.batch.families, &rows.heads, &mut s.wide);
        let turned = rows.heads.query_width() + rows.heads.key_width();
        rotate(&mut s.wide, turned, rows.angles, rows.positions, true);

        // Query, key and value projections and their norm.
        x.restore(&mut s.x);
        let input_norm = self.normalise(&s.x, &block.input_norm.weight, &mut s.normed)?;
        let parts = [("self_attn.q_proj", &block.q), ("self_attn.k_proj", &block.k), ("self_attn.v_proj", &block.v)];
        self.weights(&parts, &s.wide, &s.normed, &mut s.input)?;
        inputs(&[&block.q, &block.k, &block.v], &s.wide, &mut s.grad, &mut s.down)?;
        self.norm("input_layernorm", &block.input_norm.weight, &input_norm, &s.x, &s.grad, upstream)
    }

    fn normalise(&self, x: &[f32], weight: &Tensor, out: &mut Vec<f32>) -> Result<Vec<f32>> {
        let weight = vector(weight)?;
        out.resize(x.len(), 0.0);
        norm::rms_norm(x, &weight, self.rows.eps, out);
        Ok(weight)
    }

    fn norm(
        &mut self,
        part: &str,
        weight: &Tensor,
        values: &[f32],
        x: &[f32],
        grad: &[f32],
        upstream: &mut [f32],
    ) -> Result<()> {
        let name = format!("model.layers.{}.{part}.weight", self.index);
        let eps = self.rows.eps;
        self.gradients.with(&name, weight, |dw| {
            norm::rms_norm_backward(x, values, eps, grad, upstream, dw);
            Ok(())
        })
    }

    /// Adds `gradᵀ · input` to the gradients of projections that lie side by side in the columns of `grad`.
    fn weights(
        &mut self,
        parts: &[(&str, &Projection)],
        grad: &[f32],
        input: &[f32],
        packed: &mut Packed,
    ) -> Result<()> {
        let tokens = self.rows.positions.len();
        let grad = View::new(grad, tokens, grad.len() / tokens);
        packed.fill(&[View::new(input, tokens, input.len() / tokens)], true);
        let mut at = 0;
        for (part, projection) in parts {
            let columns = grad.columns(at..at + projection.weight.dim(0)?);
            at += columns.shape().1;
            let name = format!("model.layers.{}.{part}", self.index);
            self.gradients.with(&format!("{name}.weight"), &projection.weight, |sum| {
                gemm(columns.t(), packed, sum, true);
                Ok(())
            })?;
            if let Some(bias) = &projection.bias {
                self.gradients.with(&format!("{name}.bias"), bias, |sum| {
                    for row in 0..tokens {
                        for (sum, x) in sum.iter_mut().zip(columns.row(row)) {
                            *sum += x;
                        }
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

/// `out = grad · W`, for projections that lie side by side in the columns of `grad` `[tokens, outputs]`.
fn inputs(parts: &[&Projection], grad: &[f32], out: &mut Vec<f32>, packed: &mut Packed) -> Result<()> {
    let width = parts.iter().map(|p| p.weight.dim(0)).sum::<Result<usize>>()?;
    let grad = View::new(grad, grad.len() / width, width);
    let mut at = 0;
    for (index, projection) in parts.iter().enumerate() {
        let (outputs, inputs) = projection.weight.dims2()?;
        pack_into(packed, &[&projection.weight], false)?;
        out.resize(grad.shape().0 * inputs, 0.0);
        gemm(grad.columns(at..at + outputs), packed, out, index > 0);
        at += outputs;
    }
    Ok(())
}
