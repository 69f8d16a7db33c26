//! Matrix product of a linear layer.

use candle_core::{Result, Tensor};

/// `x · weightᵀ` `[tokens, outputs]`, of `x` `[tokens, inputs]` and `weight` `[outputs, inputs]`.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.matmul(&weight.t()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{close, floats, plain, random};
    use rehearsal_kernels::gemm::{Packed, Precision, View, gemm};

    #[test]
    fn gemm_equals_the_graph() {
        for (t, i, o) in [(1, 8, 5), (7, 64, 33), (40, 96, 130)] {
            let inputs = [random(&[t, i], 1), random(&[o, i], 2)];
            let want = plain(|x| linear(&x[0], &x[1]), &inputs);
            let (x, w) = (floats(&inputs[0]), floats(&inputs[1]));
            let (x, w, g) = (View::new(&x, t, i), View::new(&w, o, i), View::new(&want.upstream, t, o));
            let product = |a: View<'_>, b: View<'_>| {
                let mut out = vec![0.0; a.shape().0 * b.shape().1];
                gemm(a, &Packed::new(b, Precision::F32), &mut out, false);
                out
            };
            close(&product(x, w.t()), &want.output);
            close(&product(g, w), &want.gradients[0]);
            close(&product(g.t(), x), &want.gradients[1]);
        }
    }
}
