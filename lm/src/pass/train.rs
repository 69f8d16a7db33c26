//! Passes through a whole decoder: forward, with activations kept or recomputed, and backward.

use candle_core::{Result, Tensor};

use super::block::{Activations, Buffers, PreparedBlock, Rows, norm};
use super::head::Head;
use super::ops::{Answers, Ops, Sum};
use crate::model::{Batch, Block, Decoder, Gradients, Norm, Projection};

/// Log-probabilities of a batch's targets, or scores of its rows; keeps no activations.
pub fn output<O: Ops>(ops: &O, decoder: &Decoder, batch: &Batch, temperature: f64) -> Result<Tensor> {
    let mut pass = Pass::new(ops.clone(), decoder, batch)?;
    for (layer, block) in decoder.layers().blocks.iter().enumerate() {
        pass.run(layer, block, false)?;
    }
    Ok(Head::forward(ops, decoder, batch, &pass.buffers.x, temperature)?.output().clone())
}

/// State of a pass.
struct Pass<O: Ops> {
    ops: O,
    rows: Rows<O>,
    buffers: Buffers<O>,
    /// Memory of the last block's prepared weights, for the next block's.
    prepared: Option<PreparedBlock<O>>,
}

impl<O: Ops> Pass<O> {
    /// A pass whose residual stream is the embeddings of a batch.
    fn new(ops: O, decoder: &Decoder, batch: &Batch) -> Result<Self> {
        let mut pass = Self::without_embeddings(ops, decoder, batch)?;
        let (ops, scale) = (&pass.ops, decoder.embedding_scale());
        ops.embed(decoder.layers(), scale, &batch.ids, batch.positions(), &mut pass.buffers.x)?;
        Ok(pass)
    }

    /// A pass over the rows of a batch whose residual stream is empty.
    fn without_embeddings(ops: O, decoder: &Decoder, batch: &Batch) -> Result<Self> {
        let rows = Rows::new(&ops, decoder, batch.positions(), &batch.families)?;
        Ok(Self { rows, buffers: Buffers::new(&ops), prepared: None, ops })
    }

    /// Applies a block to the residual stream, and returns its activations if they are to be kept.
    fn run(&mut self, layer: usize, block: &Block, kept: bool) -> Result<Option<Activations<O>>> {
        let (ops, rows) = (&self.ops, &self.rows);
        let prepared = match self.prepared.take() {
            Some(prepared) => prepared.refill(ops, block)?,
            None => PreparedBlock::new(ops, block)?,
        };
        let heads = rows.heads(layer);
        let mut activations = kept.then(|| prepared.activations(ops));
        prepared.forward(ops, rows, layer, &mut self.buffers, activations.as_mut(), |qkv, out, lse| {
            ops.attention(qkv, &rows.layout, heads, out, lse)
        })?;
        self.prepared = Some(prepared);
        Ok(activations)
    }
}

/// What a forward pass keeps of a block: its activations, or with gradient checkpointing its input.
enum SavedBlock<O: Ops> {
    Activations(Box<Activations<O>>),
    Input(O::Buffer),
}

/// A forward pass with its activations, ready for the backward pass.
pub struct Trace<'a, O: Ops> {
    pass: Pass<O>,
    decoder: &'a Decoder,
    batch: Batch,
    blocks: Vec<SavedBlock<O>>,
    head: Head<O>,
}

impl<'a, O: Ops> Trace<'a, O> {
    /// Runs a batch through a trainable decoder.
    pub fn forward(ops: O, decoder: &'a Decoder, batch: &Batch, temperature: f64) -> Result<Self> {
        let mut pass = Pass::new(ops, decoder, batch)?;
        let mut blocks = Vec::with_capacity(decoder.layers().blocks.len());
        for (layer, block) in decoder.layers().blocks.iter().enumerate() {
            if decoder.recomputes() {
                let mut input = pass.ops.wide();
                pass.ops.copy(&pass.buffers.x, &mut input)?;
                pass.run(layer, block, false)?;
                blocks.push(SavedBlock::Input(input));
            } else if let Some(kept) = pass.run(layer, block, true)? {
                blocks.push(SavedBlock::Activations(Box::new(kept)));
            }
        }
        let head = Head::forward(&pass.ops, decoder, batch, &pass.buffers.x, temperature)?;
        Ok(Self { pass, decoder, batch: batch.clone(), blocks, head })
    }

    /// A forward pass whose results are known: the activations of each layer, made from the rows of the pass; the residual
    /// stream of the rows that go through the head; and, unless they must be computed, the head's answers.
    pub fn known(
        ops: O,
        decoder: &'a Decoder,
        batch: &Batch,
        temperature: f64,
        activations: impl FnOnce(&Rows<O>) -> Vec<Activations<O>>,
        stream: O::Buffer,
        answers: Option<Answers<O::LogSums>>,
    ) -> Result<Self> {
        let pass = Pass::without_embeddings(ops, decoder, batch)?;
        let blocks = activations(&pass.rows).into_iter().map(|kept| SavedBlock::Activations(Box::new(kept))).collect();
        let head = Head::on(&pass.ops, decoder, batch, stream, temperature, answers)?;
        Ok(Self { pass, decoder, batch: batch.clone(), blocks, head })
    }

    /// Log-probabilities of the batch's targets, or scores of its rows.
    pub fn output(&self) -> &Tensor {
        self.head.output()
    }

    /// Backward pass: adds the gradients of the parameters, given the gradient of the output.
    pub fn backward(self, grad: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let Self { mut pass, decoder, batch, blocks, head } = self;
        let ops = &pass.ops.clone();
        let mut upstream = ops.wide();
        head.backward(ops, decoder, &batch, grad, gradients, &mut upstream)?;
        let mut scratch = Scratch::new(ops);
        for (layer, (block, saved)) in decoder.layers().blocks.iter().zip(blocks).enumerate().rev() {
            let kept = match saved {
                SavedBlock::Activations(kept) => *kept,
                SavedBlock::Input(x) => {
                    pass.buffers.x = x;
                    match pass.run(layer, block, true)? {
                        Some(kept) => kept,
                        None => candle_core::bail!("a recomputed block returned no activations"),
                    }
                }
            };
            let mut pass = BlockBackward { ops, rows: &pass.rows, layer, gradients: &mut *gradients };
            pass.backward(block, kept, &mut upstream, &mut scratch)?;
        }
        let (layers, names) = (decoder.layers(), decoder.architecture().names());
        let table = gradients.sum(names.embed(), &layers.embed)?;
        ops.embed_back(&batch.ids, decoder.embedding_scale(), &upstream, &table)?;
        if let Some(positions) = &layers.positions {
            let table = gradients.sum(names.positions(), positions)?;
            ops.embed_back(batch.positions(), 1.0, &upstream, &table)?;
        }
        Ok(())
    }
}

/// Scratch buffers of the backward pass.
struct Scratch<O: Ops> {
    x: O::Buffer,
    normed: O::Buffer,
    qkv: O::Buffer,
    attended: O::Buffer,
    gate_up: O::Buffer,
    mlp: O::Buffer,
    /// Gradient of a projection's output, in GEMM precision.
    narrow: O::Buffer,
    /// Gradients of a projection's input and of a norm's input, `[rows, hidden]`.
    grad: O::Buffer,
    outer: O::Buffer,
    d_attended: O::Buffer,
    d_qkv: O::Buffer,
    /// Scratch of the products.
    products: O::Scratch,
}

impl<O: Ops> Scratch<O> {
    fn new(ops: &O) -> Self {
        Self {
            x: ops.wide(),
            normed: ops.narrow(),
            qkv: ops.narrow(),
            attended: ops.narrow(),
            gate_up: ops.narrow(),
            mlp: ops.narrow(),
            narrow: ops.narrow(),
            grad: ops.wide(),
            outer: ops.wide(),
            d_attended: ops.narrow(),
            d_qkv: ops.narrow(),
            products: ops.scratch(),
        }
    }
}

/// Backward pass of one block.
struct BlockBackward<'a, O: Ops> {
    ops: &'a O,
    rows: &'a Rows<O>,
    layer: usize,
    gradients: &'a mut Gradients,
}

impl<O: Ops> BlockBackward<'_, O> {
    /// Replaces `upstream`, the gradient of the block's output, by that of its input.
    fn backward(
        &mut self,
        block: &Block,
        kept: Activations<O>,
        upstream: &mut O::Buffer,
        s: &mut Scratch<O>,
    ) -> Result<()> {
        let (ops, rows) = (self.ops, self.rows);
        let heads = *rows.heads(self.layer);

        // Down projection and activation.
        ops.restore(kept.gate_up, &mut s.gate_up)?;
        ops.activate(rows.mlp, &s.gate_up, &mut s.mlp)?;
        let grad = self.before_norm(&block.mlp_norm, kept.down, upstream, (&mut s.x, &mut s.outer))?;
        let grad = ops.narrowed(grad, &mut s.narrow)?;
        self.weights(&[&block.down], grad, &s.mlp, &mut s.products)?;
        ops.input_gradients(&[&block.down], grad, &mut s.mlp, &mut s.products)?;
        ops.activate_back(rows.mlp, &mut s.gate_up, &s.mlp)?;

        // Gate and up projections, and their norm.
        ops.restore(kept.middle, &mut s.x)?;
        let post_norm = norm(ops, &block.post_norm)?;
        ops.norm(&s.x, &post_norm, &mut s.normed)?;
        self.weights(&block.mlp_in(), &s.gate_up, &s.normed, &mut s.products)?;
        ops.input_gradients(&block.mlp_in(), &s.gate_up, &mut s.grad, &mut s.products)?;
        let (weight, bias) = self.gradients.sums_of_norm(&block.post_norm)?;
        ops.norm_back(&s.x, &post_norm, &s.grad, upstream, (&weight, bias.as_ref()))?;

        // Output projection, attention and rotation.
        ops.restore(kept.attended, &mut s.attended)?;
        let grad = self.before_norm(&block.attention_norm, kept.projected, upstream, (&mut s.x, &mut s.outer))?;
        let grad = ops.narrowed(grad, &mut s.narrow)?;
        self.weights(&[&block.o], grad, &s.attended, &mut s.products)?;
        ops.input_gradients(&[&block.o], grad, &mut s.d_attended, &mut s.products)?;
        ops.restore(kept.qkv, &mut s.qkv)?;
        let norms = match &block.qk_norm {
            Some((q, k)) => {
                Some([(q, norm(ops, q)?, 0, heads.queries), (k, norm(ops, k)?, heads.query_width(), heads.keys)])
            }
            None => None,
        };
        let mut raw = ops.narrow();
        if let Some(norms) = &norms {
            ops.copy(&s.qkv, &mut raw)?;
            for (_, norm, at, n) in norms {
                ops.head_norm(&mut s.qkv, norm, *at, *n, &heads)?;
            }
            rows.rotate(ops, self.layer, &mut s.qkv, false)?;
        }
        ops.attention_back(&s.qkv, &s.attended, &kept.lse, &s.d_attended, &rows.layout, &heads, &mut s.d_qkv)?;
        rows.rotate(ops, self.layer, &mut s.d_qkv, true)?;
        for (named, norm, at, n) in norms.iter().flatten() {
            let (sum, _) = self.gradients.sums_of_norm(named)?;
            ops.head_norm_back(&raw, norm, *at, *n, &heads, &mut s.d_qkv, &sum)?;
        }

        // Query, key and value projections and their norm.
        ops.restore(kept.x, &mut s.x)?;
        let input_norm = norm(ops, &block.input_norm)?;
        ops.norm(&s.x, &input_norm, &mut s.normed)?;
        let parts: Vec<&Projection> = block.qkv.iter().collect();
        self.weights(&parts, &s.d_qkv, &s.normed, &mut s.products)?;
        ops.input_gradients(&parts, &s.d_qkv, &mut s.grad, &mut s.products)?;
        let (weight, bias) = self.gradients.sums_of_norm(&block.input_norm)?;
        ops.norm_back(&s.x, &input_norm, &s.grad, upstream, (&weight, bias.as_ref()))
    }

    /// Gradient of a projection's output, given that of the residual stream it is added to: the same, or through the
    /// norm between them (Gemma).
    fn before_norm<'b>(
        &mut self,
        through: &Option<Norm>,
        kept: Option<O::Kept>,
        upstream: &'b O::Buffer,
        (x, grad): (&'b mut O::Buffer, &'b mut O::Buffer),
    ) -> Result<&'b O::Buffer> {
        let (Some(named), Some(kept)) = (through, kept) else { return Ok(upstream) };
        let ops = self.ops;
        ops.restore(kept, x)?;
        ops.zero(grad, ops.len(x))?;
        let (weight, bias) = self.gradients.sums_of_norm(named)?;
        ops.norm_back(x, &norm(ops, named)?, upstream, grad, (&weight, bias.as_ref()))?;
        Ok(grad)
    }

    /// Adds the weight and bias gradients of projections of one input; `grad` has the gradients of their outputs, side
    /// by side in its columns.
    fn weights(
        &mut self,
        parts: &[&Projection],
        grad: &O::Buffer,
        input: &O::Buffer,
        scratch: &mut O::Scratch,
    ) -> Result<()> {
        let sum = |projection: &&'_ Projection| self.gradients.sums_of_projection(projection);
        let sums = parts
            .iter()
            .map(sum)
            .zip(parts)
            .map(|(sums, projection)| sums.map(|(weight, bias)| Sum { projection, weight, bias }))
            .collect::<Result<Vec<_>>>()?;
        self.ops.weight_gradients(self.rows.count, &sums, grad, input, scratch)
    }
}
