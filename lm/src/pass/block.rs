//! Forward pass of a transformer block, and the activations that its backward pass needs.

use std::sync::Arc;

use candle_core::Result;
use rehearsal_kernels::attention::{Family, Heads};

use super::ops::{Mlp, Norm, Ops, plus};
use crate::model::{self, Block, Decoder, NormKind};

/// Rows of a pass, and what all its blocks share.
pub struct Rows<O: Ops> {
    pub layout: O::Layout,
    /// Heads and rotary angles of each layer.
    layers: Vec<(Heads, Option<O::Angles>)>,
    pub mlp: Mlp,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Number of rows.
    pub count: usize,
}

impl<O: Ops> Rows<O> {
    /// Rows at positions, packed in `families`.
    pub fn new(ops: &O, decoder: &Decoder, positions: &[u32], families: &Arc<Vec<Family>>) -> Result<Self> {
        let layout = ops.layout(positions, families)?;
        Self::with_layout(ops, decoder, layout, positions.len())
    }

    /// `count` rows of a layout.
    pub fn with_layout(ops: &O, decoder: &Decoder, layout: O::Layout, count: usize) -> Result<Self> {
        let arch = decoder.architecture();
        let mut tables: Vec<(*const _, O::Angles)> = Vec::new();
        let mut angles = |layer: usize| -> Result<Option<O::Angles>> {
            let Some(angles) = decoder.angles(layer) else { return Ok(None) };
            if let Some((_, table)) = tables.iter().find(|(at, _)| *at == Arc::as_ptr(angles)) {
                return Ok(Some(table.clone()));
            }
            tables.push((Arc::as_ptr(angles), ops.angles(angles)?));
            Ok(tables.last().map(|(_, table)| table.clone()))
        };
        let layer = |layer| Ok((arch.attention(layer), angles(layer)?));
        Ok(Self {
            layout,
            layers: (0..arch.layers).map(layer).collect::<Result<_>>()?,
            mlp: Mlp::of(arch),
            hidden: arch.hidden,
            count,
        })
    }

    /// Attention heads of a layer.
    pub fn heads(&self, layer: usize) -> &Heads {
        &self.layers[layer].0
    }

    /// Rotates queries and keys by the angles of their positions (RoPE), or by the opposite angles if `back`; does
    /// nothing with learned positions.
    pub fn rotate(&self, ops: &O, layer: usize, qkv: &mut O::Buffer, back: bool) -> Result<()> {
        match &self.layers[layer] {
            (heads, Some(angles)) => ops.rotate(qkv, heads, angles, &self.layout, back),
            (_, None) => Ok(()),
        }
    }
}

/// Buffers of a forward pass, reused between blocks and passes.
pub struct Buffers<O: Ops> {
    /// The residual stream.
    pub x: O::Buffer,
    pub normed: O::Buffer,
    pub qkv: O::Buffer,
    pub attended: O::Buffer,
    pub lse: O::Buffer,
    pub projected: O::Buffer,
    /// A projection's output after its norm (Gemma).
    pub outer: O::Buffer,
    pub gate_up: O::Buffer,
    pub mlp: O::Buffer,
}

impl<O: Ops> Buffers<O> {
    pub fn new(ops: &O) -> Self {
        Self {
            x: ops.wide(),
            normed: ops.narrow(),
            qkv: ops.narrow(),
            attended: ops.narrow(),
            lse: ops.wide(),
            projected: ops.wide(),
            outer: ops.wide(),
            gate_up: ops.narrow(),
            mlp: ops.narrow(),
        }
    }
}

/// Activations of a block that its backward pass needs.
pub struct Activations<O: Ops> {
    /// The block's input.
    pub x: O::Kept,
    /// Queries, keys and values: before the per-head norms if the model has them, else after RoPE.
    pub qkv: O::Kept,
    /// Output of attention.
    pub attended: O::Kept,
    /// Log-sum-exp of the attention scores of each row and query head.
    pub lse: O::Buffer,
    /// Output of the attention's projection, if a norm follows it (Gemma).
    pub projected: Option<O::Kept>,
    /// The residual stream between attention and MLP.
    pub middle: O::Kept,
    /// Outputs of the gate and up projections.
    pub gate_up: O::Kept,
    /// Output of the down projection, if a norm follows it (Gemma).
    pub down: Option<O::Kept>,
}

/// A block's weights, prepared for GEMM.
pub struct PreparedBlock<O: Ops> {
    input_norm: Norm<O::Vector>,
    qkv: O::Projection,
    /// Norms of queries and keys, per head.
    qk_norm: Option<[Norm<O::Vector>; 2]>,
    o: O::Projection,
    attention_norm: Option<Norm<O::Vector>>,
    post_norm: Norm<O::Vector>,
    gate_up: O::Projection,
    down: O::Projection,
    mlp_norm: Option<Norm<O::Vector>>,
}

/// Prepares a norm for `ops`.
pub fn norm<O: Ops>(ops: &O, norm: &model::Norm) -> Result<Norm<O::Vector>> {
    Ok(Norm {
        layer: norm.kind == NormKind::Layer,
        eps: norm.eps as f32,
        weight: ops.vector(&norm.weight, plus(norm.kind))?,
        bias: norm.bias.as_ref().map(|b| ops.vector(b, 0.0)).transpose()?,
    })
}

impl<O: Ops> PreparedBlock<O> {
    /// Prepares a block's current weights.
    pub fn new(ops: &O, block: &Block) -> Result<Self> {
        let empty = || ops.projection();
        Self::filled(ops, block, [empty(), empty(), empty(), empty()])
    }

    /// Prepares another block's weights in the same memory.
    pub fn refill(self, ops: &O, block: &Block) -> Result<Self> {
        Self::filled(ops, block, [self.qkv, self.o, self.gate_up, self.down])
    }

    fn filled(ops: &O, b: &Block, memory: [O::Projection; 4]) -> Result<Self> {
        let [mut qkv, mut o, mut gate_up, mut down] = memory;
        ops.fill(&mut qkv, &b.qkv.iter().collect::<Vec<_>>())?;
        ops.fill(&mut o, &[&b.o])?;
        ops.fill(&mut gate_up, &b.mlp_in())?;
        ops.fill(&mut down, &[&b.down])?;
        let some = |n: &Option<model::Norm>| n.as_ref().map(|n| norm(ops, n)).transpose();
        let qk_norm = match &b.qk_norm {
            Some((q, k)) => Some([norm(ops, q)?, norm(ops, k)?]),
            None => None,
        };
        Ok(Self {
            input_norm: norm(ops, &b.input_norm)?,
            qkv,
            qk_norm,
            o,
            attention_norm: some(&b.attention_norm)?,
            post_norm: norm(ops, &b.post_norm)?,
            gate_up,
            down,
            mlp_norm: some(&b.mlp_norm)?,
        })
    }

    /// Empty activations of this block.
    pub fn activations(&self, ops: &O) -> Activations<O> {
        let some = |norm: &Option<_>| norm.is_some().then(|| ops.kept());
        Activations {
            x: ops.kept(),
            qkv: ops.kept(),
            attended: ops.kept(),
            lse: ops.wide(),
            projected: some(&self.attention_norm),
            middle: ops.kept(),
            gate_up: ops.kept(),
            down: some(&self.mlp_norm),
        }
    }

    /// Applies the block to the residual stream `b.x`, and appends the activations to `kept`, if given. `attend`
    /// computes the output of attention and its log-sum-exps from the rotated queries, keys and values.
    pub fn forward(
        &self,
        ops: &O,
        rows: &Rows<O>,
        layer: usize,
        b: &mut Buffers<O>,
        mut kept: Option<&mut Activations<O>>,
        attend: impl FnOnce(&O::Buffer, &mut O::Buffer, &mut O::Buffer) -> Result<()>,
    ) -> Result<()> {
        let raw = self.qk_norm.is_some();
        if let Some(kept) = &mut kept {
            ops.keep(&mut b.x, false, &mut kept.x)?;
        }
        ops.norm(&b.x, &self.input_norm, &mut b.normed)?;
        ops.project(&b.normed, &self.qkv, &mut b.qkv)?;
        if let (Some(kept), true) = (&mut kept, raw) {
            ops.keep(&mut b.qkv, false, &mut kept.qkv)?;
        }
        self.head_norms(ops, rows.heads(layer), &mut b.qkv)?;
        rows.rotate(ops, layer, &mut b.qkv, false)?;
        attend(&b.qkv, &mut b.attended, &mut b.lse)?;
        if let Some(kept) = &mut kept {
            ops.stack(&mut b.lse, &mut kept.lse)?;
            if !raw {
                ops.keep(&mut b.qkv, true, &mut kept.qkv)?;
            }
        }
        let residual = Residual { x: &mut b.x, projected: &mut b.projected, outer: &mut b.outer };
        let projected = kept.as_mut().and_then(|kept| kept.projected.as_mut());
        residual.add(ops, &b.attended, &self.o, &self.attention_norm, projected)?;
        if let Some(kept) = &mut kept {
            ops.keep(&mut b.attended, true, &mut kept.attended)?;
            ops.keep(&mut b.x, false, &mut kept.middle)?;
        }
        ops.norm(&b.x, &self.post_norm, &mut b.normed)?;
        ops.project(&b.normed, &self.gate_up, &mut b.gate_up)?;
        ops.activate(rows.mlp, &b.gate_up, &mut b.mlp)?;
        let residual = Residual { x: &mut b.x, projected: &mut b.projected, outer: &mut b.outer };
        let down = kept.as_mut().and_then(|kept| kept.down.as_mut());
        residual.add(ops, &b.mlp, &self.down, &self.mlp_norm, down)?;
        match kept {
            Some(kept) => ops.keep(&mut b.gate_up, true, &mut kept.gate_up),
            None => Ok(()),
        }
    }
}

impl<O: Ops> PreparedBlock<O> {
    /// Normalises queries and keys per head, if the model does.
    pub fn head_norms(&self, ops: &O, heads: &Heads, qkv: &mut O::Buffer) -> Result<()> {
        if let Some([q, k]) = &self.qk_norm {
            ops.head_norm(qkv, q, 0, heads.queries, heads)?;
            ops.head_norm(qkv, k, heads.query_width(), heads.keys, heads)?;
        }
        Ok(())
    }
}

/// The residual stream, with the buffers of what attention and MLP add to it.
struct Residual<'a, O: Ops> {
    x: &'a mut O::Buffer,
    projected: &'a mut O::Buffer,
    outer: &'a mut O::Buffer,
}

impl<O: Ops> Residual<'_, O> {
    /// Adds a projection of `input` to the residual stream, normalised if there is a norm, whose input is then appended
    /// to `kept`, if given.
    fn add(
        self,
        ops: &O,
        input: &O::Buffer,
        projection: &O::Projection,
        norm: &Option<Norm<O::Vector>>,
        kept: Option<&mut O::Kept>,
    ) -> Result<()> {
        let Some(norm) = norm else {
            return ops.project_onto(input, projection, self.projected, self.x);
        };
        ops.project(input, projection, self.projected)?;
        ops.norm(self.projected, norm, self.outer)?;
        ops.add(self.x, self.outer)?;
        match kept {
            Some(kept) => ops.keep(self.projected, true, kept),
            None => Ok(()),
        }
    }
}
