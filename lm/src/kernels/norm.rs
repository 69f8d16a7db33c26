//! RMSNorm (Zhang & Sennrich 2019): `y = x / sqrt(mean(x²) + eps) * w`, row by row.

use rayon::prelude::*;

use super::isa::per_isa;
use super::math::{LANES, dot, sum};

/// Rows a task takes at a time.
const ROWS: usize = 32;

/// `out` and `x` are `[rows, w.len()]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let block = ROWS * w.len();
    out.par_chunks_mut(block).zip(x.par_chunks(block)).for_each(|(out, x)| rows(x, w, eps, out));
}

/// Adds the gradients of [`rms_norm`] with respect to `x` and `w` to `dx` and `dw`, given `grad` with respect to its
/// result.
pub fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let block = ROWS * w.len();
    dx.par_chunks_mut(block)
        .zip(x.par_chunks(block).zip(grad.par_chunks(block)))
        .for_each(|(dx, (x, grad))| rows_backward(x, w, eps, grad, dx));
    weight_backward(x, eps, grad, dw);
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

per_isa! {
    fn rows(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
            let r = inverse_rms(x, eps);
            for i in 0..w.len() {
                out[i] = x[i] * r * w[i];
            }
        }
    }
}

per_isa! {
    fn rows_backward(x: &[f32], w: &[f32], eps: f32, grad: &[f32], dx: &mut [f32]) {
        let n = w.len();
        for ((x, grad), dx) in x.chunks_exact(n).zip(grad.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
            let r = inverse_rms(x, eps);
            let mut lanes = [0.0f32; LANES];
            for (i, ((&g, &w), &x)) in grad.iter().zip(w).zip(x).enumerate() {
                lanes[i % LANES] += g * w * x;
            }
            let pull = sum(&lanes) / n as f32 * r * r;
            for i in 0..n {
                dx[i] += r * (grad[i] * w[i] - x[i] * pull);
            }
        }
    }
}

per_isa! {
    fn weight_backward(x: &[f32], eps: f32, grad: &[f32], dw: &mut [f32]) {
        let n = dw.len();
        for (x, grad) in x.chunks_exact(n).zip(grad.chunks_exact(n)) {
            let r = inverse_rms(x, eps);
            for i in 0..n {
                dw[i] = (grad[i] * r).mul_add(x[i], dw[i]);
            }
        }
    }
}
