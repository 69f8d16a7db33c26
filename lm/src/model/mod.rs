//! One decoder for the Llama family: parameters by their Hugging Face names, and the forward pass over packed
//! sequences. [`Forward`] is the way back.

mod architecture;
mod batch;
mod memory;
mod trace;

pub use architecture::{Architecture, Rope, Scaling};
pub use batch::{Batch, Sequence};
pub use trace::{Forward, Gradients};

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};

use crate::cpu;
use crate::error::{Error, Result};
use crate::kernels::gemm::Precision;
use crate::kernels::rope::Angles;
use crate::ops::{self, AttentionShape, Kernels, Positions};

/// Named parameters.
pub type Parameters = BTreeMap<String, Tensor>;

/// A language model on one device.
///
/// Cloning shares the weights. A trainable model's weights change in place, for every clone.
#[derive(Clone)]
pub struct Decoder {
    architecture: Arc<Architecture>,
    /// Tensors without history, for inference.
    frozen: Layers,
    /// The same storage as variables, if the model is trainable.
    trained: Option<Layers>,
    variables: Arc<BTreeMap<String, Var>>,
    angles: Arc<Angles>,
    kernels: Kernels,
    precision: Precision,
    recompute: bool,
}

impl Decoder {
    /// A model that is only read. `parameters` has exactly the architecture's names and shapes.
    pub fn frozen(architecture: Architecture, parameters: Parameters) -> Result<Self> {
        Self::build(architecture, parameters, BTreeMap::new())
    }

    /// A model whose every parameter can be trained; the tensors are copied.
    pub fn trainable(architecture: Architecture, parameters: Parameters) -> Result<Self> {
        let variables = parameters
            .into_iter()
            .map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let tensors = variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Self::build(architecture, tensors, variables)
    }

    fn build(architecture: Architecture, tensors: Parameters, variables: BTreeMap<String, Var>) -> Result<Self> {
        let detached = tensors.iter().map(|(name, t)| (name.clone(), t.detach())).collect();
        let frozen = Layers::new(&architecture, &detached)?;
        let trained = if variables.is_empty() { None } else { Some(Layers::new(&architecture, &tensors)?) };
        let precision = if frozen.embed.dtype() == DType::BF16 { Precision::Bf16 } else { Precision::F32 };
        let frequencies = architecture.rope.inverse_frequencies(architecture.head_dim);
        Ok(Self {
            angles: Arc::new(Angles::new(&frequencies, architecture.context)),
            architecture: Arc::new(architecture),
            frozen,
            trained,
            variables: Arc::new(variables),
            kernels: Kernels::Fused,
            precision,
            recompute: false,
        })
    }

    /// The same model on other kernels (the plain twins are an oracle for tests).
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self
    }

    /// The same model with the factors of its matrix products rounded to bfloat16, or not. On the CPU, and for f32
    /// weights, which stay what they are.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// The same model, keeping only each block's input on the way forward and running the block again on the way
    /// back (Chen et al. 2016): a third more work for a fraction of the memory.
    pub fn with_gradient_checkpointing(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// What the model is made of.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.frozen.embed.device()
    }

    /// Type of the weights.
    pub fn dtype(&self) -> DType {
        self.frozen.embed.dtype()
    }

    /// The weights by name, without history; they share storage with the model.
    pub fn parameters(&self) -> Parameters {
        self.frozen.named(&self.architecture)
    }

    /// The trainable variables by name; empty for a frozen model.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    pub(crate) fn angles(&self) -> &Arc<Angles> {
        &self.angles
    }

    pub(crate) fn layers(&self) -> &Layers {
        &self.frozen
    }

    /// What the factors of matrix products are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub(crate) fn recomputes(&self) -> bool {
        self.recompute
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Log-probabilities `[batch.scored()]` of the batch's targets at a temperature, without a graph.
    pub fn logprobs(&self, batch: &Batch, temperature: f64) -> Result<Tensor> {
        self.check(batch)?;
        if cpu::serves(self) {
            return Ok(Tensor::new(cpu::logprobs(self, batch, temperature)?, self.device())?);
        }
        let x = self.hidden(&self.context(batch)?)?;
        self.head(&self.frozen, &x, batch, temperature)
    }

    /// The last block's output, without a graph.
    fn hidden(&self, context: &Context) -> Result<Tensor> {
        let mut x = self.frozen.embed.index_select(&context.ids, 0)?;
        for block in &self.frozen.blocks {
            x = block.forward(&x, context)?;
        }
        Ok(x)
    }

    /// Logits `[tokens, vocabulary]` after each token of one sequence: all of them at once, for short ones.
    pub fn logits(&self, ids: &[u32]) -> Result<Tensor> {
        let Some((last, rest)) = ids.split_last() else { return Err(Error::EmptyPrompt { id: 0 }) };
        // A batch leaves out a sequence's last token; repeated, it makes room for the one that is wanted.
        let batch = Batch::new([Sequence { prompt: rest, completion: &[*last, *last] }]);
        self.check(&batch)?;
        let x = self.hidden(&self.context(&batch)?)?;
        let hidden = ops::rms_norm(&x, &self.frozen.norm, self.architecture.norm_eps)?;
        Ok(ops::linear(&hidden, &self.frozen.head)?)
    }

    fn head(&self, layers: &Layers, x: &Tensor, batch: &Batch, temperature: f64) -> Result<Tensor> {
        let rows = Tensor::new(batch.rows.as_slice(), x.device())?;
        // Normalising only the rows that are asked for: a row's norm does not depend on the others.
        let rows = x.index_select(&rows, 0)?;
        let hidden = ops::rms_norm(&rows, &layers.norm, self.architecture.norm_eps)?;
        Ok(ops::head_logprobs(&hidden, &layers.head, &batch.targets, temperature)?)
    }

    /// That the batch fits the vocabulary and the context.
    fn check(&self, batch: &Batch) -> Result<()> {
        let vocab = self.architecture.vocab;
        if let Some(&token) = batch.ids.iter().chain(&batch.targets).find(|&&t| t as usize >= vocab) {
            return Err(Error::ForeignToken { token, vocab });
        }
        if let Some(&last) = batch.positions.iter().max().filter(|&&p| p as usize >= self.angles.positions()) {
            let context = self.angles.positions();
            return Err(Error::Config(format!("a sequence of {} tokens exceeds the context of {context}", last + 1)));
        }
        Ok(())
    }

    fn context(&self, batch: &Batch) -> Result<Context> {
        Ok(Context {
            ids: Tensor::new(batch.ids.as_slice(), self.device())?,
            positions: Positions::new(self.angles.clone(), batch.positions.clone()),
            attention: AttentionShape { heads: self.architecture.attention(), families: batch.families.clone() },
            eps: self.architecture.norm_eps,
        })
    }
}

/// What every layer of one forward pass shares.
struct Context {
    pub ids: Tensor,
    pub positions: Positions,
    pub attention: AttentionShape,
    pub eps: f64,
}

/// All weights, in the order of the forward pass.
#[derive(Clone)]
pub(crate) struct Layers {
    pub embed: Tensor,
    pub blocks: Vec<Block>,
    pub norm: Tensor,
    pub head: Tensor,
}

/// One transformer block.
#[derive(Clone)]
pub(crate) struct Block {
    pub input_norm: Tensor,
    pub q: Projection,
    pub k: Projection,
    pub v: Projection,
    pub o: Projection,
    pub post_norm: Tensor,
    pub gate: Projection,
    pub up: Projection,
    pub down: Projection,
}

/// A linear layer.
#[derive(Clone)]
pub(crate) struct Projection {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Projection {
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = ops::linear(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

impl Block {
    /// Names of the projections, in the order of [`Block::projections`].
    const PROJECTIONS: [&str; 7] = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];

    fn projections(&self) -> [&Projection; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    fn forward(&self, x: &Tensor, cx: &Context) -> candle_core::Result<Tensor> {
        let dim = cx.attention.heads.dim;
        let h = ops::rms_norm(x, &self.input_norm, cx.eps)?;
        let q = ops::rope(&self.q.forward(&h)?, dim, &cx.positions)?;
        let k = ops::rope(&self.k.forward(&h)?, dim, &cx.positions)?;
        let v = self.v.forward(&h)?;
        let attended = ops::attention(&q, &k, &v, &cx.attention)?;
        let x = (x + self.o.forward(&attended)?)?;
        let h = ops::rms_norm(&x, &self.post_norm, cx.eps)?;
        let mlp = ops::swiglu(&self.gate.forward(&h)?, &self.up.forward(&h)?)?;
        x + self.down.forward(&mlp)?
    }
}

impl Layers {
    fn new(architecture: &Architecture, parameters: &Parameters) -> Result<Self> {
        let get = |name: &str| {
            parameters.get(name).cloned().ok_or_else(|| Error::Config(format!("parameter `{name}` is missing")))
        };
        let block = |i: usize| -> Result<Block> {
            let projection = |part: &str| -> Result<Projection> {
                let name = format!("model.layers.{i}.{part}");
                Ok(Projection {
                    weight: get(&format!("{name}.weight"))?,
                    bias: parameters.get(&format!("{name}.bias")).cloned(),
                })
            };
            let [q, k, v, o, gate, up, down] = Block::PROJECTIONS.map(projection);
            Ok(Block {
                input_norm: get(&format!("model.layers.{i}.input_layernorm.weight"))?,
                q: q?,
                k: k?,
                v: v?,
                o: o?,
                post_norm: get(&format!("model.layers.{i}.post_attention_layernorm.weight"))?,
                gate: gate?,
                up: up?,
                down: down?,
            })
        };
        let embed = get("model.embed_tokens.weight")?;
        Ok(Self {
            blocks: (0..architecture.layers).map(block).collect::<Result<_>>()?,
            norm: get("model.norm.weight")?,
            head: if architecture.tied { embed.clone() } else { get("lm_head.weight")? },
            embed,
        })
    }

    fn named(&self, architecture: &Architecture) -> Parameters {
        let mut all = Parameters::new();
        all.insert("model.embed_tokens.weight".into(), self.embed.clone());
        for (i, block) in self.blocks.iter().enumerate() {
            for (part, projection) in Block::PROJECTIONS.iter().zip(block.projections()) {
                all.insert(format!("model.layers.{i}.{part}.weight"), projection.weight.clone());
                if let Some(bias) = &projection.bias {
                    all.insert(format!("model.layers.{i}.{part}.bias"), bias.clone());
                }
            }
            all.insert(format!("model.layers.{i}.input_layernorm.weight"), block.input_norm.clone());
            all.insert(format!("model.layers.{i}.post_attention_layernorm.weight"), block.post_norm.clone());
        }
        all.insert("model.norm.weight".into(), self.norm.clone());
        if !architecture.tied {
            all.insert("lm_head.weight".into(), self.head.clone());
        }
        all
    }
}
