//! Normalisation of rows.

use std::ops::Range;

use super::isa::per_isa;
use super::math::{LANES, dot, sum};
use super::team::{chunk, for_each_chunk, lend, share};

/// Rows a task takes at a time, at most.
const ROWS: usize = 32;

/// Elements a task takes at a time of rows of `width`.
fn block(x: &[f32], width: usize) -> usize {
    share(x.len() / width.max(1), ROWS) * width
}

/// RMSNorm (Zhang & Sennrich 2019): `y = x / sqrt(mean(x²) + eps) * w`, row by row. `out` and `x` are `[rows, w.len()]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let block = block(x, w.len());
    for_each_chunk(out, block, |i, out| rows(chunk(x, block, i), w, eps, out));
}

/// Adds the gradients of [`rms_norm`] with respect to `x` and `w` to `dx` and `dw`, given `grad` with respect to its
/// result.
pub fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let block = block(x, w.len());
    for_each_chunk(dx, block, |i, dx| rows_backward(chunk(x, block, i), w, eps, chunk(grad, block, i), dx));
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

/// LayerNorm (Ba et al. 2016): `y = (x - mean) / sqrt(var + eps) * w + b`, row by row. `out` and `x` are
/// `[rows, w.len()]`.
pub fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32, out: &mut [f32]) {
    let block = block(x, w.len());
    for_each_chunk(out, block, |i, out| layer_rows(chunk(x, block, i), w, b, eps, out));
}

/// Adds the gradients of [`layer_norm`] with respect to `x`, `w` and `b`, given `grad` with respect to its result.
pub fn layer_norm_backward(
    x: &[f32],
    w: &[f32],
    eps: f32,
    grad: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
) {
    let block = block(x, w.len());
    for_each_chunk(dx, block, |i, dx| layer_rows_backward(chunk(x, block, i), w, eps, chunk(grad, block, i), dx));
    layer_weight_backward(x, eps, grad, dw, db);
}

/// RMSNorm, in place, of every head of `w.len()` columns in some columns of rows.
pub fn head_norm(x: &mut [f32], width: usize, columns: Range<usize>, w: &[f32], eps: f32) {
    for_each_chunk(x, block(x, width), |_, x| {
        for row in x.chunks_exact_mut(width) {
            heads(&mut row[columns.clone()], w, eps);
        }
    });
}

/// Turns the gradient of [`head_norm`]'s result in those columns of `grad` into that of `before`, and adds that of the
/// weight to `dw`.
pub fn head_norm_backward(
    before: &[f32],
    width: usize,
    columns: Range<usize>,
    w: &[f32],
    eps: f32,
    grad: &mut [f32],
    dw: &mut [f32],
) {
    for (x, grad) in before.chunks_exact(width).zip(grad.chunks_exact(width)) {
        weight_backward(&x[columns.clone()], eps, &grad[columns.clone()], dw);
    }
    let block = block(before, width);
    for_each_chunk(grad, block, |i, grad| {
        lend!(Vec<f32>, |dx: &mut Vec<f32>| {
            for (x, grad) in chunk(before, block, i).chunks_exact(width).zip(grad.chunks_exact_mut(width)) {
                dx.clear();
                dx.resize(columns.len(), 0.0);
                rows_backward(&x[columns.clone()], w, eps, &grad[columns.clone()], dx);
                grad[columns.clone()].copy_from_slice(dx);
            }
        })
    });
}

/// A row's mean and the inverse of its standard deviation.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x) / n;
    let mut lanes = [0.0f32; LANES];
    for (i, &x) in x.iter().enumerate() {
        lanes[i % LANES] += (x - mean) * (x - mean);
    }
    (mean, 1.0 / (sum(&lanes) / n + eps).sqrt())
}

per_isa! {
    fn layer_rows(x: &[f32], w: &[f32], b: &[f32], eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
            let (mean, r) = moments(x, eps);
            for i in 0..w.len() {
                out[i] = ((x[i] - mean) * r).mul_add(w[i], b[i]);
            }
        }
    }
}

per_isa! {
    fn layer_rows_backward(x: &[f32], w: &[f32], eps: f32, grad: &[f32], dx: &mut [f32]) {
        let n = w.len();
        for ((x, grad), dx) in x.chunks_exact(n).zip(grad.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
            let (mean, r) = moments(x, eps);
            let (mut plain, mut along) = ([0.0f32; LANES], [0.0f32; LANES]);
            for i in 0..n {
                let g = grad[i] * w[i];
                plain[i % LANES] += g;
                along[i % LANES] += g * (x[i] - mean);
            }
            let (plain, along) = (sum(&plain) / n as f32, sum(&along) / n as f32 * r * r);
            for i in 0..n {
                dx[i] += r * (grad[i] * w[i] - plain - (x[i] - mean) * along);
            }
        }
    }
}

per_isa! {
    fn layer_weight_backward(x: &[f32], eps: f32, grad: &[f32], dw: &mut [f32], db: &mut [f32]) {
        let n = dw.len();
        for (x, grad) in x.chunks_exact(n).zip(grad.chunks_exact(n)) {
            let (mean, r) = moments(x, eps);
            for i in 0..n {
                dw[i] = (grad[i] * r).mul_add(x[i] - mean, dw[i]);
                db[i] += grad[i];
            }
        }
    }
}

per_isa! {
    fn heads(row: &mut [f32], w: &[f32], eps: f32) {
        for x in row.chunks_exact_mut(w.len()) {
            let r = inverse_rms(x, eps);
            for (x, w) in x.iter_mut().zip(w) {
                *x = *x * r * w;
            }
        }
    }
}
