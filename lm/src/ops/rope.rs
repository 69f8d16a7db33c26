//! Rotary position embeddings (RoPE).

use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor};
use rehearsal_kernels::rope::Angles;

/// Positions of the rows of a packed batch, with the table of rotary angles.
#[derive(Clone)]
pub struct Positions {
    angles: Arc<Angles>,
    positions: Arc<Vec<u32>>,
}

impl Positions {
    /// Row `t` of the batch has the angles of `positions[t]`.
    pub fn new(angles: Arc<Angles>, positions: Vec<u32>) -> Self {
        Self { angles, positions: Arc::new(positions) }
    }

    /// Cosines and sines of every row, each `[tokens, 1, head_dim / 2]`.
    fn tables(&self, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for &position in self.positions.iter() {
            let (c, s) = self.angles.at(position as usize);
            cos.extend_from_slice(c);
            sin.extend_from_slice(s);
        }
        let tokens = self.positions.len();
        let table = |data: Vec<f32>| {
            let half = data.len() / tokens.max(1);
            let table = Tensor::from_vec(data, (tokens, 1, half), &Device::Cpu)?;
            table.to_dtype(like.dtype())?.to_device(like.device())
        };
        Ok((table(cos)?, table(sin)?))
    }
}

/// Rotates every head of `x` `[tokens, heads * head_dim]` by the angles of its row's position.
pub fn rope(x: &Tensor, head_dim: usize, positions: &Positions) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let (cos, sin) = positions.tables(x)?;
    let x = x.reshape((tokens, width / head_dim, head_dim))?;
    let (a, b) = (x.narrow(D::Minus1, 0, head_dim / 2)?, x.narrow(D::Minus1, head_dim / 2, head_dim / 2)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)?.reshape((tokens, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{close, floats, plain, random};
    use rehearsal_kernels::rope::rotate;

    #[test]
    fn the_kernel_equals_the_graph() {
        let angles = Arc::new(Angles::new(&[1.0, 0.3, 0.01, 0.002], 100));
        let rows: Vec<u32> = (0..70).map(|i| i * 7 % 100).collect();
        let positions = Positions::new(angles.clone(), rows.clone());
        let inputs = [random(&[70, 24], 1)];
        let want = plain(|x| rope(&x[0], 8, &positions), &inputs);
        let (mut out, mut grad) = (floats(&inputs[0]), want.upstream.clone());
        rotate(&mut out, 24, &angles, &rows, false);
        rotate(&mut grad, 24, &angles, &rows, true);
        close(&out, &want.output);
        close(&grad, &want.gradients[0]);
    }
}
