//! Normalisation of rows.

use candle_core::{D, DType, Result, Tensor};

/// RMSNorm over the last dimension: `x / sqrt(mean(x²) + eps) * weight`, with the mean in f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    wide.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)
}

/// LayerNorm over the last dimension: `(x - mean) / sqrt(var + eps) * weight + bias`, with its statistics in f32.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)?.broadcast_add(bias)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::norm;
    use crate::ops::twin::{close, floats, plain, random};

    #[test]
    fn the_kernel_equals_the_graph() {
        for (rows, width) in [(1, 8), (33, 50), (70, 576)] {
            let inputs = [random(&[rows, width], 1), random(&[width], 2)];
            let want = plain(|x| rms_norm(&x[0], &x[1], 1e-5), &inputs);
            let (x, w) = (floats(&inputs[0]), floats(&inputs[1]));
            let mut out = vec![0.0; x.len()];
            norm::rms_norm(&x, &w, 1e-5, &mut out);
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; width]);
            norm::rms_norm_backward(&x, &w, 1e-5, &want.upstream, &mut dx, &mut dw);
            close(&out, &want.output);
            close(&dx, &want.gradients[0]);
            close(&dw, &want.gradients[1]);
        }
    }
}
