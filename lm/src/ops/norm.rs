//! RMSNorm and LayerNorm.

use candle_core::{D, DType, Result, Tensor};

/// RMSNorm over the last dimension: `x / sqrt(mean(x²) + eps) * weight`, with the mean in f32.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let scale = (wide.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    wide.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)
}

/// LayerNorm over the last dimension: `(x - mean) / sqrt(var + eps) * weight + bias`, with mean and variance in f32.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { x.clone() } else { x.to_dtype(DType::F32)? };
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    centred.broadcast_div(&scale)?.to_dtype(x.dtype())?.broadcast_mul(weight)?.broadcast_add(bias)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{close, floats, plain, random};
    use rehearsal_kernels::norm;

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

    #[test]
    fn the_layer_norm_kernel_equals_the_graph() {
        for (rows, width) in [(1, 8), (33, 50), (70, 576)] {
            let inputs = [random(&[rows, width], 1), random(&[width], 2), random(&[width], 3)];
            let want = plain(|x| layer_norm(&x[0], &x[1], &x[2], 1e-5), &inputs);
            let [x, w, b] = [0, 1, 2].map(|i| floats(&inputs[i]));
            let mut out = vec![0.0; x.len()];
            norm::layer_norm(&x, &w, &b, 1e-5, &mut out);
            let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; width], vec![0.0; width]);
            norm::layer_norm_backward(&x, &w, 1e-5, &want.upstream, &mut dx, &mut dw, &mut db);
            close(&out, &want.output);
            close(&dx, &want.gradients[0]);
            close(&dw, &want.gradients[1]);
            close(&db, &want.gradients[2]);
        }
    }

    #[test]
    fn the_per_head_kernel_equals_the_graph() {
        // Heads of 6 in columns 4..22 of rows of 30; the other columns pass through.
        let (rows, width, columns, dim) = (35, 30, 4..22, 6);
        let inputs = [random(&[rows, width], 1), random(&[dim], 2)];
        let want = plain(
            |x| {
                let heads = x[0].narrow(1, 4, 18)?.reshape((rows * 3, dim))?;
                let normed = rms_norm(&heads, &x[1], 1e-6)?.reshape((rows, 18))?;
                Tensor::cat(&[x[0].narrow(1, 0, 4)?, normed, x[0].narrow(1, 22, 8)?], 1)
            },
            &inputs,
        );
        let (before, w) = (floats(&inputs[0]), floats(&inputs[1]));
        let (mut x, mut grad, mut dw) = (before.clone(), want.upstream.clone(), vec![0.0; dim]);
        norm::head_norm(&mut x, width, columns.clone(), &w, 1e-6);
        norm::head_norm_backward(&before, width, columns, &w, 1e-6, &mut grad, &mut dw);
        close(&x, &want.output);
        close(&grad, &want.gradients[0]);
        close(&dw, &want.gradients[1]);
    }
}
