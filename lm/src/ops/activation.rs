//! Activation functions of the MLP.

use candle_core::{Result, Tensor};

/// `silu(gate) * up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

/// `gelu(gate) * up`, with the tanh approximation of GELU.
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.gelu()? * up
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{close, floats, plain, random};
    use rehearsal_kernels::activation::{Activation, backward, forward};

    #[test]
    fn the_kernels_equal_the_graph() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for gated in [true, false] {
                for (rows, width) in [(1, 8), (33, 50), (70, 576)] {
                    let wide = if gated { 2 * width } else { width };
                    let inputs = [random(&[rows, wide], 1)];
                    let graph = |x: &[Tensor]| {
                        let half = |at| x[0].narrow(1, at, width);
                        match (activation, gated) {
                            (Activation::Silu, true) => swiglu(&half(0)?, &half(width)?),
                            (Activation::GeluTanh, true) => geglu(&half(0)?, &half(width)?),
                            (Activation::Silu, false) => x[0].silu(),
                            (Activation::GeluTanh, false) => x[0].gelu(),
                        }
                    };
                    let want = plain(graph, &inputs);
                    let mut input = floats(&inputs[0]);
                    let mut out = vec![0.0; rows * width];
                    forward(activation, gated, width, &input, &mut out);
                    backward(activation, gated, width, &mut input, &want.upstream);
                    close(&out, &want.output);
                    close(&input, &want.gradients[0]);
                }
            }
        }
    }
}
