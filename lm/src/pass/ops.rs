//! Operations of a pass, which every backend implements.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rehearsal_kernels::attention::{Family, Heads};
use rehearsal_kernels::rope::Angles;

use crate::model::{Activation, Architecture, Layers, NormKind, Projection};

/// A norm with its parameters in the memory of a backend.
pub struct Norm<V> {
    /// LayerNorm if true; else RMSNorm, whose weight already includes the one added by Gemma.
    pub layer: bool,
    pub eps: f32,
    pub weight: V,
    pub bias: Option<V>,
}

/// Activation between the products of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mlp {
    /// Whether input rows are `[gate | up]` and give `act(gate) · up`; else they give `act(up)`.
    pub gated: bool,
    pub activation: Activation,
    /// Columns of the output.
    pub width: usize,
}

impl Mlp {
    /// The MLP of a model's blocks.
    pub fn of(arch: &Architecture) -> Self {
        Self { gated: arch.gated, activation: arch.activation, width: arch.mlp }
    }

    /// Columns of the activation's input.
    pub fn input_width(self) -> usize {
        if self.gated { 2 * self.width } else { self.width }
    }
}

/// What the language-model head computes for its input rows.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// Token of each row whose log-probability is computed.
    pub targets: &'a [u32],
    /// Divides the logits.
    pub temperature: f32,
    /// Logits are softcapped first: `cap · tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// Whether entropies are computed too.
    pub entropy: bool,
}

/// Output of the language-model head for a [`Question`], with what its backward pass needs.
pub struct Answers<L> {
    /// Log-probabilities of the targets, followed by the entropies, if computed.
    pub output: Tensor,
    /// Log-sum-exp of each row's logits.
    pub lse: L,
}

/// Gradients of a projection, which are added to in place: f32, in the parameters' own shapes.
pub struct Sum<'a> {
    pub projection: &'a Projection,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// Operations of a pass. Buffers are row-major; an operation resizes its `out` and overwrites it.
///
/// A buffer is *wide* (f32: the residual stream, its gradient, sums) or *narrow* (in GEMM precision, f32 or bfloat16:
/// the inputs and outputs of matrix products).
pub trait Ops: Clone {
    type Buffer;
    /// Log-sum-exps of the head's logits, one for each row.
    type LogSums;
    /// An activation kept for the backward pass.
    type Kept;
    /// Parameters of a norm.
    type Vector;
    /// Weights of projections of one input, concatenated so that they are one product.
    type Projection;
    /// Rotary angles.
    type Angles: Clone;
    /// Positions of the rows of a pass, and the packed sequences they belong to.
    type Layout;
    /// Scratch of the backward pass's products.
    type Scratch;

    fn wide(&self) -> Self::Buffer;
    fn narrow(&self) -> Self::Buffer;
    fn scratch(&self) -> Self::Scratch;

    /// Copies a vector, and adds `plus` to every element.
    fn vector(&self, tensor: &Tensor, plus: f32) -> Result<Self::Vector>;
    fn projection(&self) -> Self::Projection;
    /// Replaces the contents of `projection` by the current weights of `parts`.
    fn fill(&self, projection: &mut Self::Projection, parts: &[&Projection]) -> Result<()>;
    fn angles(&self, angles: &Arc<Angles>) -> Result<Self::Angles>;
    /// Layout of rows at positions, packed in `families`.
    fn layout(&self, positions: &[u32], families: &Arc<Vec<Family>>) -> Result<Self::Layout>;

    /// An empty activation.
    fn kept(&self) -> Self::Kept;
    /// Appends rows to a kept activation; `spent` allows it to take the buffer's memory.
    fn keep(&self, buffer: &mut Self::Buffer, spent: bool, onto: &mut Self::Kept) -> Result<()>;
    /// Appends the rows of a wide buffer, whose memory may be taken, to another.
    fn stack(&self, buffer: &mut Self::Buffer, onto: &mut Self::Buffer) -> Result<()>;
    /// Copies a kept activation into a buffer.
    fn restore(&self, kept: Self::Kept, buffer: &mut Self::Buffer) -> Result<()>;
    /// `x` in GEMM precision, converted into `scratch` if needed.
    fn narrowed<'a>(&self, x: &'a Self::Buffer, scratch: &'a mut Self::Buffer) -> Result<&'a Self::Buffer>;
    /// Elements of a buffer.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// Resizes a buffer to `len` zeros.
    fn zero(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()>;
    fn copy(&self, from: &Self::Buffer, to: &mut Self::Buffer) -> Result<()>;
    /// `x += y`.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;

    /// Embeddings of `ids` times `scale`, plus learned positions if there are any.
    fn embed(&self, layers: &Layers, scale: f32, ids: &[u32], positions: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// Adds `scale * grad[i]` to row `ids[i]` of a table's gradient `sum`.
    fn embed_back(&self, ids: &[u32], scale: f32, grad: &Self::Buffer, sum: &Tensor) -> Result<()>;

    fn norm(&self, x: &Self::Buffer, norm: &Norm<Self::Vector>, out: &mut Self::Buffer) -> Result<()>;
    /// Adds the gradient of the input to `dx`, and those of weight and bias to `sums`.
    fn norm_back(
        &self,
        x: &Self::Buffer,
        norm: &Norm<Self::Vector>,
        grad: &Self::Buffer,
        dx: &mut Self::Buffer,
        sums: (&Tensor, Option<&Tensor>),
    ) -> Result<()>;
    /// Normalises, in place, each of the `heads` heads of `shape.dim` columns that start at column `at`.
    fn head_norm(
        &self,
        qkv: &mut Self::Buffer,
        norm: &Norm<Self::Vector>,
        at: usize,
        heads: usize,
        shape: &Heads,
    ) -> Result<()>;
    /// Backward of [`Ops::head_norm`], whose input was `before`: replaces `grad`, the gradient of the output, by that
    /// of the input, and adds the gradient of the weight to `sum`.
    #[allow(clippy::too_many_arguments)]
    fn head_norm_back(
        &self,
        before: &Self::Buffer,
        norm: &Norm<Self::Vector>,
        at: usize,
        heads: usize,
        shape: &Heads,
        grad: &mut Self::Buffer,
        sum: &Tensor,
    ) -> Result<()>;
    /// Rotates queries and keys by the angles of their rows' positions, or by the opposite angles if `back`.
    fn rotate(
        &self,
        qkv: &mut Self::Buffer,
        heads: &Heads,
        angles: &Self::Angles,
        layout: &Self::Layout,
        back: bool,
    ) -> Result<()>;
    /// Activation of the MLP.
    fn activate(&self, mlp: Mlp, input: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Backward of [`Ops::activate`]: replaces `input` by its gradient, given that of the output.
    fn activate_back(&self, mlp: Mlp, input: &mut Self::Buffer, grad: &Self::Buffer) -> Result<()>;

    /// Causal attention over the packed sequences of the layout, and the log-sum-exp of each row and query head.
    fn attention(
        &self,
        qkv: &Self::Buffer,
        layout: &Self::Layout,
        heads: &Heads,
        out: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    ) -> Result<()>;
    /// Backward of [`Ops::attention`]: fills `d_qkv`.
    #[allow(clippy::too_many_arguments)]
    fn attention_back(
        &self,
        qkv: &Self::Buffer,
        out: &Self::Buffer,
        lse: &Self::Buffer,
        grad: &Self::Buffer,
        layout: &Self::Layout,
        heads: &Heads,
        d_qkv: &mut Self::Buffer,
    ) -> Result<()>;

    /// `out = x · Wᵀ + b`.
    fn project(&self, x: &Self::Buffer, w: &Self::Projection, out: &mut Self::Buffer) -> Result<()>;
    /// `onto += x · Wᵀ + b`; `scratch` may hold the product.
    fn project_onto(
        &self,
        x: &Self::Buffer,
        w: &Self::Projection,
        scratch: &mut Self::Buffer,
        onto: &mut Self::Buffer,
    ) -> Result<()>;
    /// Adds the gradients of weights and biases of projections to `sums`, given their common input and the gradients of
    /// their outputs, side by side, `[rows, outputs]`.
    fn weight_gradients(
        &self,
        rows: usize,
        sums: &[Sum<'_>],
        grad: &Self::Buffer,
        input: &Self::Buffer,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;
    /// `out = grad · W`, with the weights of `parts` concatenated.
    fn input_gradients(
        &self,
        parts: &[&Projection],
        grad: &Self::Buffer,
        out: &mut Self::Buffer,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// Copies `rows` of `x`, in order.
    fn gather(&self, x: &Self::Buffer, width: usize, rows: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// Sets `out` to `tokens` rows of zeros, then adds row `i` of `x` to row `rows[i]`.
    fn scatter(
        &self,
        x: &Self::Buffer,
        width: usize,
        rows: &[u32],
        tokens: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Language-model head: log-probabilities, and entropies if asked for.
    fn answer(&self, hidden: &Self::Buffer, head: &Tensor, question: Question<'_>) -> Result<Answers<Self::LogSums>>;
    /// Backward of [`Ops::answer`]: fills `d_hidden` and adds the gradient of the head's weight to `sum`.
    #[allow(clippy::too_many_arguments)]
    fn answer_back(
        &self,
        hidden: &Self::Buffer,
        head: &Tensor,
        question: Question<'_>,
        answers: &Answers<Self::LogSums>,
        grad: &Tensor,
        d_hidden: &mut Self::Buffer,
        sum: &Tensor,
    ) -> Result<()>;
    /// Score head: `hidden · weight`, one score per row.
    fn scores(&self, hidden: &Self::Buffer, weight: &Tensor) -> Result<Tensor>;
    /// Backward of [`Ops::scores`]: fills `d_hidden` and adds the gradient of the head's weight to `sum`.
    fn scores_back(
        &self,
        hidden: &Self::Buffer,
        weight: &Tensor,
        grad: &Tensor,
        d_hidden: &mut Self::Buffer,
        sum: &Tensor,
    ) -> Result<()>;
}

/// What is added to a norm's weight before rows are multiplied by it: 1 for Gemma's RMSNorm, else 0.
pub fn plus(kind: NormKind) -> f32 {
    if kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 }
}
