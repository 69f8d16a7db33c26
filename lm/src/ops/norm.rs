//! RMSNorm.

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

use super::{Kernels, floats, with_floats};
use crate::kernels::norm;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension of `x` `[tokens, width]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, kernels: Kernels) -> Result<Tensor> {
    if kernels.fused(x) {
        return x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps: eps as f32 });
    }
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(weight)
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        if xl.shape().dims().last() != wl.shape().dims().first() {
            bail!("rms-norm: x is {:?}, the weight {:?}", xl.shape(), wl.shape());
        }
        let x = floats(x, xl, "x")?;
        let mut out = vec![0.0; x.len()];
        norm::rms_norm(x, floats(w, wl, "weight")?, self.eps, &mut out);
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) =
            with_floats([x, w, &grad.contiguous()?], |[x, w, g]| Ok(norm::rms_norm_backward(x, w, self.eps, g)))?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        let dw = Tensor::from_vec(dw, w.shape(), w.device())?;
        Ok((Some(dx), w.track_op().then_some(dw)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{check, random};

    #[test]
    fn fused_equals_plain() {
        for (t, n) in [(1, 7), (5, 64), (40, 100)] {
            check(|x, k| rms_norm(&x[0], &x[1], 1e-5, k), &[random(&[t, n], 1), random(&[n], 2)]);
        }
    }
}
