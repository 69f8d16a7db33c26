//! Rotary positions.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, D, Device, Layout, Result, Shape, Tensor};

use super::{Kernels, floats, with_floats};
use crate::kernels::rope::{Angles, rotate};

/// Where each row of a packed batch stands in its sequence, with the angles to turn it by.
#[derive(Clone)]
pub struct Positions {
    angles: Arc<Angles>,
    positions: Arc<Vec<u32>>,
}

impl Positions {
    /// `positions[t]` indexes the rows of `angles`.
    pub fn new(angles: Arc<Angles>, positions: Vec<u32>) -> Self {
        Self { angles, positions: Arc::new(positions) }
    }

    /// Cosines and sines of every row, `[tokens, 1, head_dim / 2]`.
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

/// Turns every head of `x` `[tokens, heads * head_dim]` by the position of its row.
pub fn rope(x: &Tensor, head_dim: usize, positions: &Positions, kernels: Kernels) -> Result<Tensor> {
    if kernels.fused(x) {
        return x.contiguous()?.apply_op1(Rope { positions: positions.clone(), back: false });
    }
    let (tokens, width) = x.dims2()?;
    let (cos, sin) = positions.tables(x)?;
    let x = x.reshape((tokens, width / head_dim, head_dim))?;
    let (a, b) = (x.narrow(D::Minus1, 0, head_dim / 2)?, x.narrow(D::Minus1, head_dim / 2, head_dim / 2)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)?.reshape((tokens, width))
}

struct Rope {
    positions: Positions,
    back: bool,
}

impl Rope {
    fn turned(&self, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        let turned = out.len() / self.positions.positions.len().max(1);
        rotate(&mut out, turned, &self.positions.angles, &self.positions.positions, self.back);
        out
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(self.turned(floats(x, l, "x")?)), l.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Rope { positions: self.positions.clone(), back: !self.back };
        let turned = with_floats([&grad.contiguous()?], |[g]| Ok(back.turned(g)))?;
        Tensor::from_vec(turned, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{check, random};

    #[test]
    fn fused_equals_plain() {
        let angles = Arc::new(Angles::new(&[1.0, 0.1, 0.01, 0.001], 64));
        let positions = Positions::new(angles, vec![0, 1, 2, 0, 1, 63]);
        check(|x, k| rope(&x[0], 8, &positions, k), &[random(&[6, 24], 1)]);
    }
}
