//! A language model on one device.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use rehearsal_kernels::gemm::Precision;
use rehearsal_kernels::gpu::{self, Context, GpuBackend};
use rehearsal_kernels::rope::Angles;

use super::architecture::{Architecture, HeadKind, Parameters, Position, Rope};
use super::batch::Batch;
use super::layers::{LayerContext, Layers};
use crate::error::{Error, Result};
use crate::ops::{self, AttentionShape, Kernels, Positions};

/// A language model on one device.
///
/// Clones share the weights: training changes a trainable model's weights in place, for every clone.
#[derive(Clone)]
pub struct Decoder {
    architecture: Arc<Architecture>,
    /// Tensors without gradient tracking, for inference.
    frozen: Layers,
    /// The same storage as variables, if the model is trainable.
    trained: Option<Layers>,
    /// The weights by name, without gradient tracking.
    parameters: Arc<Parameters>,
    variables: Arc<BTreeMap<String, Var>>,
    angles: Arc<Angles>,
    /// Angles of the layers with a sliding window, if they have their own.
    sliding_angles: Option<Arc<Angles>>,
    kernels: Kernels,
    precision: Precision,
    recompute: bool,
    /// The GPU backend that runs its passes, if any.
    gpu: Option<Context>,
}

impl Decoder {
    /// Creates a model for inference. `parameters` must have exactly the architecture's names and shapes.
    pub fn frozen(architecture: Architecture, parameters: Parameters) -> Result<Self> {
        Self::build(architecture, parameters, BTreeMap::new())
    }

    /// Creates a model all of whose parameters are trainable variables; the tensors are copied.
    pub fn trainable(architecture: Architecture, parameters: Parameters) -> Result<Self> {
        let variables = parameters
            .into_iter()
            .map(|(name, tensor)| Ok((name, Var::from_tensor(&tensor)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        let tensors = variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Self::build(architecture, tensors, variables)
    }

    fn build(architecture: Architecture, tensors: Parameters, variables: BTreeMap<String, Var>) -> Result<Self> {
        let detached: Parameters = tensors.iter().map(|(name, t)| (name.clone(), t.detach())).collect();
        let frozen = Layers::new(&architecture, &detached)?;
        let trained = if variables.is_empty() { None } else { Some(Layers::new(&architecture, &tensors)?) };
        let precision = if frozen.embed.dtype() == DType::BF16 { Precision::Bf16 } else { Precision::F32 };
        let table =
            |rope: &Rope| Arc::new(Angles::new(&rope.inverse_frequencies(architecture.head_dim), architecture.context));
        let (angles, sliding_angles) = match &architecture.position {
            Position::Rotary { rope, sliding } => (table(rope), sliding.as_ref().map(table)),
            Position::Learned => (Arc::new(Angles::new(&[], 0)), None),
        };
        let gpu = gpu::for_device(frozen.embed.device())?.map(Context::new);
        Ok(Self {
            angles,
            sliding_angles,
            architecture: Arc::new(architecture),
            frozen,
            trained,
            parameters: Arc::new(detached),
            variables: Arc::new(variables),
            kernels: Kernels::Fused,
            precision,
            recompute: false,
            gpu,
        })
    }

    /// The same model with another implementation of its operations; tests compare the two.
    pub fn with_kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self
    }

    /// The same model with another GEMM precision: the inputs of matrix products are rounded to it, sums stay f32. For
    /// f32 weights, which do not change themselves.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// The same model with gradient checkpointing (Chen et al. 2016): the forward pass keeps only each block's input,
    /// and the backward pass computes the block again. A third more work for a fraction of the memory; results do not
    /// change.
    pub fn with_gradient_checkpointing(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// The same model with its passes run by a GPU backend, which must be able to access its tensors.
    pub fn with_gpu_backend(mut self, backend: Arc<dyn GpuBackend>) -> Self {
        self.gpu = Some(Context::new(backend));
        self
    }

    pub(crate) fn gpu(&self) -> Option<&Context> {
        self.gpu.as_ref()
    }

    /// The architecture.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Device of the weights.
    pub fn device(&self) -> &Device {
        self.frozen.embed.device()
    }

    /// Type of the weights.
    pub fn dtype(&self) -> DType {
        self.frozen.embed.dtype()
    }

    /// The weights by name, without gradient tracking; they share storage with the model.
    pub fn parameters(&self) -> Parameters {
        (*self.parameters).clone()
    }

    /// The trainable variables by name; empty for a frozen model.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// Rotary angles of a layer; `None` with learned positions.
    pub(crate) fn angles(&self, layer: usize) -> Option<&Arc<Angles>> {
        let arch = &self.architecture;
        match &self.sliding_angles {
            _ if !matches!(arch.position, Position::Rotary { .. }) => None,
            Some(angles) if arch.slides(layer) => Some(angles),
            _ => Some(&self.angles),
        }
    }

    /// Factor on the embeddings.
    pub(crate) fn embedding_scale(&self) -> f32 {
        self.frozen.embedding_scale(&self.architecture) as f32
    }

    pub(crate) fn layers(&self) -> &Layers {
        &self.frozen
    }

    /// The weights as variables, if the model is trainable.
    pub(crate) fn trained(&self) -> Option<&Layers> {
        self.trained.as_ref()
    }

    /// GEMM precision: what the inputs of matrix products are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub(crate) fn recomputes(&self) -> bool {
        self.recompute
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Applies the softcap of the logits, if there is one.
    pub(crate) fn softcapped(&self, logits: Tensor) -> Result<Tensor> {
        Ok(ops::softcap(logits, self.architecture.final_softcap)?)
    }

    pub(crate) fn require_head(&self, head: HeadKind) -> Result<()> {
        match (self.architecture.head, head) {
            (HeadKind::Score, HeadKind::Language) => {
                Err(Error::Head("a language model is needed, but this model has a `score` head"))
            }
            (HeadKind::Language, HeadKind::Score) => Err(Error::Head(
                "a model with a `score` head is needed (`...ForSequenceClassification` with one label), \
                 but this one is a language model",
            )),
            _ => Ok(()),
        }
    }

    /// Checks that the batch fits the vocabulary and the context.
    pub(crate) fn check(&self, batch: &Batch) -> Result<()> {
        let (vocab, context) = (self.architecture.vocab, self.architecture.context);
        if let Some(&token) = batch.ids.iter().chain(&batch.targets).find(|&&t| t as usize >= vocab) {
            return Err(Error::TokenOutOfVocabulary { token, vocab });
        }
        match batch.positions().iter().max() {
            Some(&last) if last as usize >= context => Err(Error::Config(format!(
                "a sequence of {} tokens exceeds the context of {context} tokens; shorten it",
                last + 1
            ))),
            _ => Ok(()),
        }
    }

    /// Embeddings `[tokens, hidden]` of the batch.
    pub(crate) fn embedded(&self, layers: &Layers, batch: &Batch) -> Result<Tensor> {
        layers.embed(&self.architecture, &batch.ids, batch.positions())
    }

    /// Inputs of a layer, beside its weights, for rows at `positions`.
    pub(crate) fn layer(&self, layer: usize, positions: &[u32]) -> LayerContext {
        LayerContext {
            heads: self.architecture.attention(layer),
            positions: self.angles(layer).map(|angles| Positions::new(angles.clone(), positions.to_vec())),
        }
    }

    /// Attention shape of each layer over a batch.
    pub(crate) fn attention(&self, batch: &Batch) -> impl Fn(usize) -> AttentionShape {
        let families = batch.families.clone();
        move |layer| AttentionShape { heads: self.architecture.attention(layer), families: families.clone() }
    }
}
