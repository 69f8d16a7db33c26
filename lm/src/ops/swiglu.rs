//! SwiGLU.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{Kernels, floats, with_floats};
use crate::kernels::swiglu;

/// `silu(gate) * up`, both of one shape.
pub fn swiglu(gate: &Tensor, up: &Tensor, kernels: Kernels) -> Result<Tensor> {
    if kernels.fused(gate) { gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGlu) } else { gate.silu()? * up }
}

struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, gl: &Layout, up: &CpuStorage, ul: &Layout) -> Result<(CpuStorage, Shape)> {
        if gl.shape() != ul.shape() {
            bail!("swiglu: gate is {:?}, up is {:?}", gl.shape(), ul.shape());
        }
        let gate = floats(gate, gl, "gate")?;
        let mut out = vec![0.0; gate.len()];
        swiglu::swiglu(gate, floats(up, ul, "up")?, &mut out);
        Ok((CpuStorage::F32(out), gl.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dg, du) =
            with_floats([gate, up, &grad.contiguous()?], |[gate, up, g]| Ok(swiglu::swiglu_backward(gate, up, g)))?;
        let tensor = |data| Tensor::from_vec(data, gate.shape(), gate.device());
        Ok((Some(tensor(dg)?), Some(tensor(du)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{check, random};

    #[test]
    fn fused_equals_plain() {
        check(|x, k| swiglu(&x[0], &x[1], k), &[random(&[9, 70], 1), random(&[9, 70], 2)]);
    }
}
