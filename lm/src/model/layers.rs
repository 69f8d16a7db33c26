//! A decoder's weights in the order of the forward pass, and the transformer block as a candle graph.

use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};
use rehearsal_kernels::activation::Activation;
use rehearsal_kernels::attention::Heads;

use super::architecture::{Architecture, NormKind, Parameters};
use crate::error::Error;
use crate::ops::{self, Positions};

/// All weights, in the order of the forward pass.
#[derive(Clone)]
pub(crate) struct Layers {
    pub embed: Tensor,
    /// Table of learned positions (GPT-2).
    pub positions: Option<Tensor>,
    pub blocks: Vec<Block>,
    pub norm: Norm,
    pub head: Tensor,
}

/// A normalisation layer.
#[derive(Clone)]
pub(crate) struct Norm {
    /// Name of its parameters, without `.weight` or `.bias`.
    pub name: String,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub kind: NormKind,
    pub eps: f64,
}

impl Norm {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (self.kind, &self.bias) {
            (NormKind::Layer, Some(bias)) => ops::layer_norm(x, &self.weight, bias, self.eps),
            (NormKind::RmsPlusOne, _) => ops::rms_norm(x, &(&self.weight + 1.0)?, self.eps),
            _ => ops::rms_norm(x, &self.weight, self.eps),
        }
    }

    /// Normalises every head of `x` `[rows, heads * dim]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let dim = self.weight.dim(0)?;
        self.forward(&x.reshape((rows * width / dim, dim))?)?.reshape((rows, width))
    }
}

/// A linear layer.
#[derive(Clone)]
pub(crate) struct Projection {
    /// Name of its parameters, without `.weight` or `.bias`.
    pub name: String,
    /// `[outputs, inputs]`.
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    /// Whether the parameter is stored transposed, `[inputs, outputs]` (GPT-2).
    pub turned: bool,
}

impl Projection {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = ops::linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// One transformer block.
#[derive(Clone)]
pub(crate) struct Block {
    pub input_norm: Norm,
    /// Projections whose concatenated outputs are queries, keys and values.
    pub qkv: Vec<Projection>,
    /// Norms of queries and keys, per head.
    pub qk_norm: Option<(Norm, Norm)>,
    pub o: Projection,
    /// Norm of the attention's output.
    pub attention_norm: Option<Norm>,
    /// Norm of the MLP's input.
    pub post_norm: Norm,
    pub gate: Option<Projection>,
    pub up: Projection,
    pub down: Projection,
    /// Norm of the MLP's output.
    pub mlp_norm: Option<Norm>,
    activation: Activation,
}

/// Inputs of a block beside its weights.
pub(crate) struct LayerContext {
    pub heads: Heads,
    /// Rotary positions of the rows.
    pub positions: Option<Positions>,
}

impl Block {
    /// Applies the block to the residual stream `x` `[rows, hidden]`; `attend` computes attention from queries, keys
    /// and values.
    pub fn forward(
        &self,
        x: &Tensor,
        cx: &LayerContext,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let normed = |norm: &Option<Norm>, x: Tensor| norm.as_ref().map_or(Ok(x.clone()), |n| n.forward(&x));
        let h = self.input_norm.forward(x)?;
        let parts = self.qkv.iter().map(|p| p.forward(&h)).collect::<Result<Vec<_>>>()?;
        let (q_width, k_width) = (cx.heads.query_width(), cx.heads.key_width());
        let (mut q, mut k, v) = match <[Tensor; 3]>::try_from(parts) {
            Ok([q, k, v]) => (q, k, v),
            Err(parts) => {
                let all = Tensor::cat(&parts, 1)?;
                let part = |at, n| all.narrow(1, at, n)?.contiguous();
                (part(0, q_width)?, part(q_width, k_width)?, part(q_width + k_width, k_width)?)
            }
        };
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.heads(&q)?, k_norm.heads(&k)?);
        }
        if let Some(positions) = &cx.positions {
            (q, k) = (ops::rope(&q, cx.heads.dim, positions)?, ops::rope(&k, cx.heads.dim, positions)?);
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

    /// The MLP's input projections in the order in which they are concatenated: gate, if there is one, and up.
    pub fn mlp_in(&self) -> Vec<&Projection> {
        self.gate.iter().chain([&self.up]).collect()
    }
}

impl Layers {
    /// Assigns named parameters to layers.
    pub fn new(architecture: &Architecture, parameters: &Parameters) -> crate::Result<Self> {
        let parts = Parts { architecture, parameters };
        let names = architecture.names();
        let embed = parts.get(names.embed())?;
        let head = parts.get(architecture.head_name())?;
        let learned = parameters.get(names.positions()).cloned();
        let blocks = (0..architecture.layers).map(|i| parts.block(i)).collect::<crate::Result<_>>()?;
        Ok(Self { embed, positions: learned, blocks, norm: parts.norm(names.norm())?, head })
    }

    /// Embeddings `[tokens, hidden]` of tokens at positions.
    pub fn embed(&self, architecture: &Architecture, ids: &[u32], positions: &[u32]) -> crate::Result<Tensor> {
        let device = self.embed.device();
        let mut x = self.embed.index_select(&Tensor::new(ids, device)?, 0)?;
        let scale = self.embedding_scale(architecture);
        if scale != 1.0 {
            x = (x * scale)?;
        }
        if let Some(table) = &self.positions {
            x = (x + table.index_select(&Tensor::new(positions, device)?, 0)?)?;
        }
        Ok(x)
    }
}

impl Layers {
    /// Factor on the embeddings, rounded to the type of the weights as in transformers.
    pub fn embedding_scale(&self, architecture: &Architecture) -> f64 {
        let scale = architecture.embedding_scale().unwrap_or(1.0);
        match self.embed.dtype() {
            DType::BF16 => bf16::from_f64(scale).to_f64(),
            DType::F16 => f16::from_f64(scale).to_f64(),
            DType::F32 => scale as f32 as f64,
            _ => scale,
        }
    }
}

/// Builds layers from the named parameters of an architecture.
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
            name: name.into(),
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
            // GPT-2 stores its matrices as `[inputs, outputs]`.
            let turned = arch.model_type == "gpt2";
            Ok(Projection { name, weight: if turned { weight.t()? } else { weight }, bias, turned })
        };
        if arch.model_type == "gpt2" {
            return Ok(Block {
                input_norm: norm("ln_1")?,
                qkv: vec![projection("attn.c_attn")?],
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
            qkv: vec![
                projection("self_attn.q_proj")?,
                projection("self_attn.k_proj")?,
                projection("self_attn.v_proj")?,
            ],
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
