//! Gated activations.

use candle_core::{Result, Tensor};

/// `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

/// `gelu(gate) * up`, with GELU's tanh approximation.
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.gelu()? * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::swiglu as kernel;
    use crate::ops::twin::{close, floats, plain, random};

    #[test]
    fn the_kernel_equals_the_graph() {
        for (rows, width) in [(1, 8), (33, 50), (70, 576)] {
            let inputs = [random(&[rows, 2 * width], 1)];
            let halves = |x: &[Tensor]| swiglu(&x[0].narrow(1, 0, width)?, &x[0].narrow(1, width, width)?);
            let want = plain(halves, &inputs);
            let mut gate_up = floats(&inputs[0]);
            let mut out = vec![0.0; rows * width];
            kernel::swiglu(&gate_up, width, &mut out);
            kernel::swiglu_backward(&mut gate_up, width, &want.upstream);
            close(&out, &want.output);
            close(&gate_up, &want.gradients[0]);
        }
    }
}
