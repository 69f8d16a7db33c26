//! A decoder's weights in the order of the forward pass, and a block as a candle graph.

use candle_core::{DType, Result, Tensor};

use super::{Activation, Architecture, NormKind, Parameters};
use crate::error::Error;
use crate::ops::{self, Positions};

/// All weights, in the order of the forward pass.
#[derive(Clone)]
pub(crate) struct Layers {
    pub embed: Tensor,
    /// Learned positions.
    positions: Option<Tensor>,
    pub blocks: Vec<Block>,
    pub norm: Norm,
    pub head: Tensor,
}

/// A normalisation of rows.
#[derive(Clone)]
pub(crate) struct Norm {
    pub weight: Tensor,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
}

impl Norm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (self.kind, &self.bias) {
            (NormKind::Layer, Some(bias)) => ops::layer_norm(x, &self.weight, bias, self.eps),
            (NormKind::RmsPlusOne, _) => ops::rms_norm(x, &(&self.weight + 1.0)?, self.eps),
            _ => ops::rms_norm(x, &self.weight, self.eps),
        }
    }

    /// Normalises every head of rows of them side by side.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let dim = self.weight.dim(0)?;
        self.forward(&x.reshape((rows * width / dim, dim))?)?.reshape((rows, width))
    }
}

/// A linear layer.
#[derive(Clone)]
pub(crate) struct Projection {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Projection {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// Some of the outputs.
    fn outputs(&self, from: usize, n: usize) -> Result<Self> {
        Ok(Self {
            weight: self.weight.narrow(0, from, n)?,
            bias: self.bias.as_ref().map(|b| b.narrow(0, from, n)).transpose()?,
        })
    }
}

/// One transformer block.
#[derive(Clone)]
pub(crate) struct Block {
    pub input_norm: Norm,
    pub q: Projection,
    pub k: Projection,
    pub v: Projection,
    /// Norms of queries and keys, head by head.
    qk_norm: Option<(Norm, Norm)>,
    pub o: Projection,
    /// Norm of the attention's output.
    attention_norm: Option<Norm>,
    /// Norm of the MLP's input.
    pub post_norm: Norm,
    pub gate: Option<Projection>,
    pub up: Projection,
    pub down: Projection,
    /// Norm of the MLP's output.
    mlp_norm: Option<Norm>,
    activation: Activation,
}

/// What a block works with beside its weights.
pub(crate) struct LayerContext {
    pub head_dim: usize,
    /// Rotary positions of the rows.
    pub positions: Option<Positions>,
}

impl Block {
    /// Carries the residual stream `x` through the block; `attend` turns queries, keys and values into their output.
    pub fn forward(
        &self,
        x: &Tensor,
        cx: &LayerContext,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let normed = |norm: &Option<Norm>, x: Tensor| norm.as_ref().map_or(Ok(x.clone()), |n| n.forward(&x));
        let h = self.input_norm.forward(x)?;
        let (mut q, mut k, v) = (self.q.forward(&h)?, self.k.forward(&h)?, self.v.forward(&h)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.heads(&q)?, k_norm.heads(&k)?);
        }
        if let Some(positions) = &cx.positions {
            (q, k) = (ops::rope(&q, cx.head_dim, positions)?, ops::rope(&k, cx.head_dim, positions)?);
        }
        let attended = self.o.forward(&attend(&q, &k, &v)?)?;
        let x = (x + normed(&self.attention_norm, attended)?)?;
        let h = self.post_norm.forward(&x)?;
        let up = self.up.forward(&h)?;
        let mlp = match (&self.gate, self.activation) {
            (Some(gate), Activation::Silu) => ops::swiglu(&gate.forward(&h)?, &up)?,
            (Some(gate), Activation::GeluTanh) => ops::geglu(&gate.forward(&h)?, &up)?,
            (None, Activation::Silu) => up.silu()?,
            (None, Activation::GeluTanh) => up.gelu()?,
        };
        x + normed(&self.mlp_norm, self.down.forward(&mlp)?)?
    }
}

impl Layers {
    /// Puts parameters by name in their places.
    pub fn new(architecture: &Architecture, parameters: &Parameters) -> crate::Result<Self> {
        let parts = Parts { architecture, parameters };
        let names = architecture.names();
        let embed = parts.get(names.embed())?;
        let head = parts.get(architecture.head_name())?;
        let learned = parameters.get(names.positions()).cloned();
        let blocks = (0..architecture.layers).map(|i| parts.block(i)).collect::<crate::Result<_>>()?;
        Ok(Self { embed, positions: learned, blocks, norm: parts.norm(names.norm())?, head })
    }

    /// Embeddings of tokens at positions.
    pub fn embed(&self, architecture: &Architecture, ids: &[u32], positions: &[u32]) -> crate::Result<Tensor> {
        let device = self.embed.device();
        let mut x = self.embed.index_select(&Tensor::new(ids, device)?, 0)?;
        if let Some(scale) = architecture.embedding_scale() {
            // transformers rounds the factor to the type of the weights.
            let scale = Tensor::new(scale, device)?.to_dtype(x.dtype())?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            x = (x * scale)?;
        }
        if let Some(table) = &self.positions {
            x = (x + table.index_select(&Tensor::new(positions, device)?, 0)?)?;
        }
        Ok(x)
    }
}

/// Parameters by name, for an architecture.
struct Parts<'a> {
    architecture: &'a Architecture,
    parameters: &'a Parameters,
}

impl Parts<'_> {
    fn get(&self, name: &str) -> crate::Result<Tensor> {
        self.parameters.get(name).cloned().ok_or_else(|| Error::Config(format!("parameter `{name}` is missing")))
    }

    fn norm(&self, name: &str) -> crate::Result<Norm> {
        Ok(Norm {
            weight: self.get(&format!("{name}.weight"))?,
            bias: self.parameters.get(&format!("{name}.bias")).cloned(),
            kind: self.architecture.norm,
            eps: self.architecture.norm_eps,
        })
    }

    fn block(&self, i: usize) -> crate::Result<Block> {
        let arch = self.architecture;
        let name = |part: &str| arch.names().layer(i, part);
        let norm = |part: &str| self.norm(&name(part));
        let projection = |part: &str| -> crate::Result<Projection> {
            let name = name(part);
            let weight = self.get(&format!("{name}.weight"))?;
            let bias = self.parameters.get(&format!("{name}.bias")).cloned();
            // GPT-2 keeps its matrices as inputs by outputs.
            Ok(Projection { weight: if arch.model_type == "gpt2" { weight.t()? } else { weight }, bias })
        };
        if arch.model_type == "gpt2" {
            let (qkv, h) = (projection("attn.c_attn")?, arch.hidden);
            return Ok(Block {
                input_norm: norm("ln_1")?,
                q: qkv.outputs(0, h)?,
                k: qkv.outputs(h, h)?,
                v: qkv.outputs(2 * h, h)?,
                qk_norm: None,
                o: projection("attn.c_proj")?,
                attention_norm: None,
                post_norm: norm("ln_2")?,
                gate: None,
                up: projection("mlp.c_fc")?,
                down: projection("mlp.c_proj")?,
                mlp_norm: None,
                activation: arch.activation,
            });
        }
        let (after_attention, before_mlp, after_mlp) = if arch.sandwich {
            let outer = (norm("post_attention_layernorm")?, norm("post_feedforward_layernorm")?);
            (Some(outer.0), norm("pre_feedforward_layernorm")?, Some(outer.1))
        } else {
            (None, norm("post_attention_layernorm")?, None)
        };
        let qk_norm = if arch.qk_norm { Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)) } else { None };
        Ok(Block {
            input_norm: norm("input_layernorm")?,
            q: projection("self_attn.q_proj")?,
            k: projection("self_attn.k_proj")?,
            v: projection("self_attn.v_proj")?,
            qk_norm,
            o: projection("self_attn.o_proj")?,
            attention_norm: after_attention,
            post_norm: before_mlp,
            gate: Some(projection("mlp.gate_proj")?),
            up: projection("mlp.up_proj")?,
            down: projection("mlp.down_proj")?,
            mlp_norm: after_mlp,
            activation: arch.activation,
        })
    }
}
