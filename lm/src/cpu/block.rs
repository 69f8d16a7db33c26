//! A transformer block over rows: forward, and what the way back needs to keep.

use rayon::prelude::*;

use super::weights::PackedBlock;
use crate::kernels::attention::Heads;
use crate::kernels::gemm::Precision;
use crate::kernels::rope::{Angles, rotate};
use crate::kernels::{gemm, norm, swiglu};
use crate::model::Decoder;

/// What every block of a pass shares.
pub struct Rows<'a> {
    pub heads: Heads,
    pub eps: f32,
    pub angles: &'a Angles,
    /// Position of each row in its sequence.
    pub positions: &'a [u32],
}

impl<'a> Rows<'a> {
    /// Rows of a decoder at positions.
    pub fn new(decoder: &'a Decoder, positions: &'a [u32]) -> Self {
        let arch = decoder.architecture();
        Self { heads: arch.attention(0), eps: arch.norm_eps as f32, angles: decoder.angles(), positions }
    }
}

/// Buffers of a pass, kept between blocks and passes.
#[derive(Default)]
pub struct Buffers {
    /// The residual stream.
    pub x: Vec<f32>,
    pub normed: Vec<f32>,
    pub qkv: Vec<f32>,
    pub attended: Vec<f32>,
    pub projected: Vec<f32>,
    pub gate_up: Vec<f32>,
    pub mlp: Vec<f32>,
    pub logits: Vec<f32>,
}

/// An activation kept for the way back, in the precision of the products.
pub enum Kept {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

impl Kept {
    /// Takes a buffer's contents.
    pub fn take(buffer: &mut Vec<f32>, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(std::mem::take(buffer)),
            Precision::Bf16 => Self::Bf16(rounded(buffer)),
        }
    }

    /// Copies a buffer's contents.
    pub fn copy(buffer: &[f32], precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(buffer.to_vec()),
            Precision::Bf16 => Self::Bf16(rounded(buffer)),
        }
    }

    /// The contents as f32, in `buffer`.
    pub fn restore(self, buffer: &mut Vec<f32>) {
        match self {
            Self::F32(data) => *buffer = data,
            Self::Bf16(data) => {
                buffer.resize(data.len(), 0.0);
                buffer.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK)).for_each(|(out, x)| {
                    for (out, &x) in out.iter_mut().zip(x) {
                        *out = gemm::widen_bf16(x);
                    }
                });
            }
        }
    }
}

/// Elements a task takes at a time.
const CHUNK: usize = 16 * 1024;

fn rounded(x: &[f32]) -> Vec<u16> {
    let mut out = vec![0; x.len()];
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| gemm::round_row(x, out));
    out
}

/// A block's activations.
pub struct Activations {
    /// The block's input.
    pub x: Kept,
    pub qkv: Kept,
    pub attended: Kept,
    /// Log-sum-exp of the attention scores.
    pub lse: Vec<f32>,
    /// The residual stream between attention and MLP.
    pub middle: Kept,
    pub gate_up: Kept,
}

impl PackedBlock {
    /// Carries the residual stream `b.x` through the block. `attend` fills the attention's output from the rotated
    /// queries, keys and values.
    pub fn forward(&self, rows: &Rows<'_>, b: &mut Buffers, attend: impl FnOnce(&[f32], &mut [f32])) {
        self.before_attention(rows, b);
        b.attended.resize(rows.positions.len() * rows.heads.query_width(), 0.0);
        attend(&b.qkv, &mut b.attended);
        self.after_attention(b);
        self.before_down(rows, b);
        self.after_down(b);
    }

    /// [`PackedBlock::forward`], keeping what the way back needs. `attend` also fills the log-sum-exps.
    pub fn forward_keeping(
        &self,
        rows: &Rows<'_>,
        b: &mut Buffers,
        attend: impl FnOnce(&[f32], &mut [f32], &mut [f32]),
    ) -> Activations {
        let precision = self.qkv.precision();
        let x = Kept::copy(&b.x, precision);
        self.before_attention(rows, b);
        b.attended.resize(rows.positions.len() * rows.heads.query_width(), 0.0);
        let mut lse = vec![0.0; rows.positions.len() * rows.heads.queries];
        attend(&b.qkv, &mut b.attended, &mut lse);
        let qkv = Kept::take(&mut b.qkv, precision);
        self.after_attention(b);
        let attended = Kept::take(&mut b.attended, precision);
        let middle = Kept::copy(&b.x, precision);
        self.before_down(rows, b);
        let gate_up = Kept::take(&mut b.gate_up, precision);
        self.after_down(b);
        Activations { x, qkv, attended, lse, middle, gate_up }
    }

    fn before_attention(&self, rows: &Rows<'_>, b: &mut Buffers) {
        b.normed.resize(b.x.len(), 0.0);
        norm::rms_norm(&b.x, &self.input_norm, rows.eps, &mut b.normed);
        self.qkv.apply(&b.normed, &mut b.qkv);
        let turned = rows.heads.query_width() + rows.heads.key_width();
        rotate(&mut b.qkv, turned, rows.angles, rows.positions, false);
    }

    fn after_attention(&self, b: &mut Buffers) {
        self.o.apply(&b.attended, &mut b.projected);
        add(&mut b.x, &b.projected);
    }

    fn before_down(&self, rows: &Rows<'_>, b: &mut Buffers) {
        norm::rms_norm(&b.x, &self.post_norm, rows.eps, &mut b.normed);
        self.gate_up.apply(&b.normed, &mut b.gate_up);
        let width = self.gate_up.width() / 2;
        b.mlp.resize(b.gate_up.len() / 2, 0.0);
        swiglu::swiglu(&b.gate_up, width, &mut b.mlp);
    }

    fn after_down(&self, b: &mut Buffers) {
        self.down.apply(&b.mlp, &mut b.projected);
        add(&mut b.x, &b.projected);
    }
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(x, y)| {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    });
}
