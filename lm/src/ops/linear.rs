//! `y = x · wᵀ`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{Kernels, floats, with_floats};
use crate::kernels::gemm::{Packed, View, gemm};

/// `x` `[tokens, inputs]` times the transpose of `weight` `[outputs, inputs]`.
pub fn linear(x: &Tensor, weight: &Tensor, kernels: Kernels) -> Result<Tensor> {
    if kernels.fused(x) { x.contiguous()?.apply_op2(&weight.contiguous()?, Linear) } else { x.matmul(&weight.t()?) }
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((tokens, inputs), (outputs, width)) = (xl.shape().dims2()?, wl.shape().dims2()?);
        if inputs != width {
            bail!("linear: x has {inputs} columns, the weight wants {width}");
        }
        let w = Packed::new(View::new(floats(w, wl, "weight")?, outputs, inputs).t());
        let mut y = vec![0.0; tokens * outputs];
        gemm(View::new(floats(x, xl, "x")?, tokens, inputs), &w, &mut y, false);
        Ok((CpuStorage::F32(y), (tokens, outputs).into()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((tokens, inputs), outputs) = (x.dims2()?, w.dim(0)?);
        let grad = grad.contiguous()?;
        let dx = x.track_op().then(|| {
            product([&grad, w], (tokens, inputs), |[g, w]| {
                (View::new(g, tokens, outputs), View::new(w, outputs, inputs))
            })
        });
        let dw = w.track_op().then(|| {
            product([&grad, x], (outputs, inputs), |[g, x]| {
                (View::new(g, tokens, outputs).t(), View::new(x, tokens, inputs))
            })
        });
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

/// The product of two tensors' elements, each seen as `views` says.
fn product(
    tensors: [&Tensor; 2],
    shape: (usize, usize),
    views: impl for<'a> FnOnce([&'a [f32]; 2]) -> (View<'a>, View<'a>),
) -> Result<Tensor> {
    let mut out = vec![0.0; shape.0 * shape.1];
    with_floats(tensors, |slices| {
        let (a, b) = views(slices);
        gemm(a, &Packed::new(b), &mut out, false);
        Ok(())
    })?;
    Tensor::from_vec(out, shape, tensors[0].device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{check, random};

    #[test]
    fn fused_equals_plain() {
        for (t, i, o) in [(1, 8, 5), (7, 64, 33), (40, 96, 130)] {
            check(|x, k| linear(&x[0], &x[1], k), &[random(&[t, i], 1), random(&[o, i], 2)]);
        }
    }
}
