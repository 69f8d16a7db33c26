//! What a pass asks of the machine it runs on.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use rehearsal_kernels::attention::{Family, Heads};
use rehearsal_kernels::rope::Angles;

use crate::model::{Activation, Architecture, Layers, NormKind, Projection};

/// A norm with its numbers where the machine wants them.
pub struct Norm<V> {
    /// LayerNorm, or RMSNorm with `plus_one` already in the weight.
    pub layer: bool,
    pub eps: f32,
    pub weight: V,
    pub bias: Option<V>,
}

/// What stands between the MLP's products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mlp {
    /// Rows are a gate and what it is multiplied with, side by side; else one activated projection.
    pub gated: bool,
    pub activation: Activation,
    /// Columns of the result.
    pub width: usize,
}

impl Mlp {
    /// That of a model's blocks.
    pub fn of(arch: &Architecture) -> Self {
        Self { gated: arch.gated, activation: arch.activation, width: arch.mlp }
    }

    /// Columns of the activation's input.
    pub fn input_width(self) -> usize {
        if self.gated { 2 * self.width } else { self.width }
    }
}

/// What is asked about rows that go through the language head.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    pub targets: &'a [u32],
    pub temperature: f32,
    /// Logits are bent to `cap · tanh(logit / cap)` first.
    pub softcap: Option<f32>,
    /// Whether the entropies are asked for beside the targets' log-probabilities.
    pub entropy: bool,
}

/// Answers to a [`Question`], with what the way back needs.
pub struct Answers<B> {
    /// Log-probabilities of the targets, followed by the entropies if they were asked for.
    pub output: Tensor,
    /// Log-sum-exp of each row's logits.
    pub lse: B,
}

/// A parameter's gradient, a sum that is added to in place: f32, in the parameter's own shape.
pub struct Sum<'a> {
    pub projection: &'a Projection,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// The arithmetic of a pass. Buffers hold rows end to end; results replace what an `out` held, whatever its size was.
///
/// A buffer is *wide* (always f32: the residual stream, its gradient, sums) or *narrow* (what the products read and
/// write: f32 or bfloat16).
pub trait Ops: Clone {
    type Buffer;
    /// A buffer put away for the way back.
    type Kept;
    /// Numbers of a norm.
    type Vector;
    /// Projections of one input side by side, as one product.
    type Projection;
    /// Rotary angles.
    type Angles: Clone;
    /// Where the rows of a pass stand.
    type Layout;
    /// What the products of the way back reuse.
    type Scratch;

    fn wide(&self) -> Self::Buffer;
    fn narrow(&self) -> Self::Buffer;
    fn scratch(&self) -> Self::Scratch;

    /// Numbers of a vector, each plus `plus`.
    fn vector(&self, tensor: &Tensor, plus: f32) -> Result<Self::Vector>;
    fn projection(&self) -> Self::Projection;
    /// Prepares weights as they are now, in the place of what was there.
    fn fill(&self, projection: &mut Self::Projection, parts: &[&Projection]) -> Result<()>;
    fn angles(&self, angles: &Arc<Angles>) -> Result<Self::Angles>;
    /// Rows at positions, in families whose rows follow one another.
    fn layout(&self, positions: &[u32], families: &Arc<Vec<Family>>) -> Result<Self::Layout>;

    /// Nothing put away yet.
    fn kept(&self) -> Self::Kept;
    /// Puts rows away, behind those that were put there before; a buffer that is `spent` may be taken for it.
    fn keep(&self, buffer: &mut Self::Buffer, spent: bool, onto: &mut Self::Kept) -> Result<()>;
    /// Puts the rows of a wide buffer, which is spent, behind those of another.
    fn stack(&self, buffer: &mut Self::Buffer, onto: &mut Self::Buffer) -> Result<()>;
    fn restore(&self, kept: Self::Kept, buffer: &mut Self::Buffer) -> Result<()>;
    /// `x` as the products read it; `room` is used if that takes a copy.
    fn narrowed<'a>(&self, x: &'a Self::Buffer, room: &'a mut Self::Buffer) -> Result<&'a Self::Buffer>;
    fn len(&self, buffer: &Self::Buffer) -> usize;
    fn zero(&self, buffer: &mut Self::Buffer, len: usize) -> Result<()>;
    fn copy(&self, from: &Self::Buffer, to: &mut Self::Buffer) -> Result<()>;
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer) -> Result<()>;

    /// Embeddings times `scale`, plus learned positions where there are some.
    fn embed(&self, layers: &Layers, scale: f32, ids: &[u32], positions: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// Adds `scale` times each row of `grad` to the row `ids` names of a table's sum.
    fn embed_back(&self, ids: &[u32], scale: f32, grad: &Self::Buffer, sum: &Tensor) -> Result<()>;

    fn norm(&self, x: &Self::Buffer, norm: &Norm<Self::Vector>, out: &mut Self::Buffer) -> Result<()>;
    /// Adds to `dx` and to the sums of the weight and the bias.
    fn norm_back(
        &self,
        x: &Self::Buffer,
        norm: &Norm<Self::Vector>,
        grad: &Self::Buffer,
        dx: &mut Self::Buffer,
        sums: (&Tensor, Option<&Tensor>),
    ) -> Result<()>;
    /// Normalises, in place, every head of the first `heads` heads of `dim` columns from column `at` on.
    fn head_norm(
        &self,
        qkv: &mut Self::Buffer,
        norm: &Norm<Self::Vector>,
        at: usize,
        heads: usize,
        shape: &Heads,
    ) -> Result<()>;
    /// Turns the gradient of the normalised heads, in place, into that of what they were before.
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
    /// Turns queries and keys by their rows' positions, or back.
    fn rotate(
        &self,
        qkv: &mut Self::Buffer,
        heads: &Heads,
        angles: &Self::Angles,
        layout: &Self::Layout,
        back: bool,
    ) -> Result<()>;
    fn activate(&self, mlp: Mlp, input: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// Turns the activation's input, in place, into its gradient.
    fn activate_back(&self, mlp: Mlp, input: &mut Self::Buffer, grad: &Self::Buffer) -> Result<()>;

    fn attention(
        &self,
        qkv: &Self::Buffer,
        layout: &Self::Layout,
        heads: &Heads,
        out: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    ) -> Result<()>;
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
    /// `onto += x · Wᵀ + b`.
    fn project_onto(
        &self,
        x: &Self::Buffer,
        w: &Self::Projection,
        room: &mut Self::Buffer,
        onto: &mut Self::Buffer,
    ) -> Result<()>;
    /// Adds the gradients of weights and biases, given the projections' input and the gradient of their results side by
    /// side, over so many rows.
    fn weight_gradients(
        &self,
        rows: usize,
        sums: &[Sum<'_>],
        grad: &Self::Buffer,
        input: &Self::Buffer,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;
    /// `out = grad · W`.
    fn input_gradients(
        &self,
        parts: &[&Projection],
        grad: &Self::Buffer,
        out: &mut Self::Buffer,
        scratch: &mut Self::Scratch,
    ) -> Result<()>;

    /// The rows that are read, in order.
    fn gather(&self, x: &Self::Buffer, width: usize, rows: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// Adds rows to those of `out` that are named, which is `tokens` rows of zeros before.
    fn scatter(
        &self,
        x: &Self::Buffer,
        width: usize,
        rows: &[u32],
        tokens: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    fn answer(&self, hidden: &Self::Buffer, head: &Tensor, question: Question<'_>) -> Result<Answers<Self::Buffer>>;
    /// Fills `d_hidden` and adds to the head's sum, given the gradient of the output.
    #[allow(clippy::too_many_arguments)]
    fn answer_back(
        &self,
        hidden: &Self::Buffer,
        head: &Tensor,
        question: Question<'_>,
        answers: &Answers<Self::Buffer>,
        grad: &Tensor,
        d_hidden: &mut Self::Buffer,
        sum: &Tensor,
    ) -> Result<()>;
    /// `hidden · weight`, a score a row.
    fn scores(&self, hidden: &Self::Buffer, weight: &Tensor) -> Result<Tensor>;
    fn scores_back(
        &self,
        hidden: &Self::Buffer,
        weight: &Tensor,
        grad: &Tensor,
        d_hidden: &mut Self::Buffer,
        sum: &Tensor,
    ) -> Result<()>;
}

/// Whether a norm's weight is one less than what rows are multiplied by.
pub fn plus(kind: NormKind) -> f32 {
    if kind == NormKind::RmsPlusOne { 1.0 } else { 0.0 }
}
