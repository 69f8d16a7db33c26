//! Activations kept for the backward pass.

use std::sync::Arc;

use candle_core::Result;
use rehearsal_kernels::gemm::{self, Precision};
use rehearsal_kernels::team::{chunk, for_each_chunk};

use super::machine::Cpu;
use super::rows::CHUNK;
use crate::pass::Activations;

/// An activation kept for the backward pass, in the precision of the products.
pub enum Kept {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
    /// Rows of an activation that generation has recorded.
    Recalled(Recalled),
}

impl Kept {
    /// An empty activation with a capacity of `numbers` elements.
    pub fn with_capacity(precision: Precision, numbers: usize) -> Self {
        match precision {
            Precision::F32 => Self::F32(Vec::with_capacity(numbers)),
            Precision::Bf16 => Self::Bf16(Vec::with_capacity(numbers)),
        }
    }
}

/// Rows of a recorded activation of a layer, by their indices.
pub struct Recalled {
    pub from: Arc<Activations<Cpu>>,
    pub which: fn(&Activations<Cpu>) -> Option<&Kept>,
    pub rows: Arc<Vec<u32>>,
    pub width: usize,
}

impl Recalled {
    /// Copies the rows to `out`, as f32.
    pub fn gather(&self, out: &mut Vec<f32>) -> Result<()> {
        match (self.which)(&self.from) {
            Some(Kept::F32(data)) => self.gather_from(data, out, |row, out| out.copy_from_slice(row)),
            Some(Kept::Bf16(data)) => self.gather_from(data, out, widen_row),
            Some(Kept::Recalled(_)) | None => candle_core::bail!("an activation was not recorded"),
        }
        Ok(())
    }

    fn gather_from<E: Sync>(&self, data: &[E], out: &mut Vec<f32>, copy: fn(&[E], &mut [f32])) {
        let (rows, width) = (&self.rows, self.width);
        out.resize(rows.len() * width, 0.0);
        let group = CHUNK.div_ceil(width);
        for_each_chunk(out, group * width, |i, out| {
            for (&row, out) in chunk(rows, group, i).iter().zip(out.chunks_exact_mut(width)) {
                copy(&data[row as usize * width..][..width], out);
            }
        });
    }
}

/// Rounds `x` to bfloat16 and appends it to `out`.
pub fn round_onto(out: &mut Vec<u16>, x: &[f32]) {
    let start = out.len();
    out.resize(start + x.len(), 0);
    for_each_chunk(&mut out[start..], CHUNK, |i, out| gemm::round_row(chunk(x, CHUNK, i), out));
}

/// Converts bfloat16 to f32.
pub fn widened(x: &[u16], out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    for_each_chunk(out, CHUNK, |i, out| widen_row(chunk(x, CHUNK, i), out));
}

fn widen_row(x: &[u16], out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = gemm::widen_bf16(x);
    }
}
