//! The decoder on the CPU, by hand: one block that generation, scoring and training run forward, and its way back.
//!
//! Weights are read from candle's storage and packed for the products; everything else is rows of f32 in buffers
//! that are used again. The plain-candle graph ([`crate::model`]) computes the same and is the oracle.

mod block;
mod head;
mod train;
mod weights;

pub use block::{Buffers, Rows};
pub use train::{Trace, lookup, output};
pub use weights::{PackedWeights, with_views as with_matrices};

use crate::kernels::gemm::{Element, View};
use crate::model::Decoder;
use crate::ops::Kernels;

/// Whether a decoder runs here.
pub fn serves(decoder: &Decoder) -> bool {
    use candle_core::DType::{BF16, F32};
    let (kernels, device) = (decoder.kernels() == Kernels::Fused, decoder.device().is_cpu());
    kernels && device && matches!(decoder.dtype(), F32 | BF16) && decoder.architecture().is_plain()
}

/// Rows of a matrix as f32.
fn gather<E: Element>(matrix: View<'_, E>, rows: impl ExactSizeIterator<Item = usize>, out: &mut Vec<f32>) {
    let width = matrix.shape().1;
    out.resize(rows.len() * width, 0.0);
    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
        E::copy(matrix.row(row), out);
    }
}

#[cfg(test)]
mod tests;
