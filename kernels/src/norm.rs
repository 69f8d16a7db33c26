//! RMSNorm and LayerNorm of rows, and of the heads within rows; forward and backward.

use std::ops::Range;

use crate::isa::per_isa;
use crate::math::{dot, sum, sums};
use crate::shared::Shared;
use crate::team::{chunk, for_each, for_each_chunk, lend, share};

/// Rows per task, at most.
const ROWS: usize = 32;

/// Columns of a weight's gradient per task.
const COLUMNS: usize = 64;

/// Elements per task, for rows of `width` elements.
fn block(x: &[f32], width: usize) -> usize {
    share(x.len() / width.max(1), ROWS) * width
}

/// RMSNorm (Zhang & Sennrich 2019): `y = x / sqrt(mean(x²) + eps) * w`, row by row. `out` and `x` are `[rows, w.len()]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let block = block(x, w.len());
    for_each_chunk(out, block, |i, out| rows(chunk(x, block, i), w, eps, out));
}

/// Backward pass of [`rms_norm`]: adds the gradients of `x` and `w` to `dx` and `dw`, given `grad`, the gradient of the
/// output.
pub fn rms_norm_backward(x: &[f32], w: &[f32], eps: f32, grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
    let block = block(x, w.len());
    for_each_chunk(dx, block, |i, dx| rows_backward(chunk(x, block, i), w, eps, chunk(grad, block, i), dx));
    weight_gradient(x, grad, &Vectors::rows(w.len()), eps, dw);
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
            let [along] = sums([grad, w, x], |[g, w, x]| [g * w * x]);
            let pull = along / n as f32 * r * r;
            for i in 0..n {
                dx[i] += r * (grad[i] * w[i] - x[i] * pull);
            }
        }
    }
}

/// Where the vectors to normalise are in a matrix: side by side in some columns of each row.
struct Vectors {
    width: usize,
    columns: Range<usize>,
    dim: usize,
}

impl Vectors {
    /// One vector per row, the whole row.
    fn rows(dim: usize) -> Self {
        Self { width: dim, columns: 0..dim, dim }
    }

    fn count(&self, x: &[f32]) -> usize {
        x.len() / self.width.max(1) * self.per_row()
    }

    fn per_row(&self) -> usize {
        self.columns.len() / self.dim.max(1)
    }

    /// Index of a vector's first element.
    #[inline(always)]
    fn start(&self, vector: usize) -> usize {
        let (row, place) = (vector / self.per_row(), vector % self.per_row());
        row * self.width + self.columns.start + place * self.dim
    }
}

/// Adds the gradient of an RMSNorm's weight to `dw`. Each column is one chain of additions in the order of the vectors.
fn weight_gradient(x: &[f32], grad: &[f32], vectors: &Vectors, eps: f32, dw: &mut [f32]) {
    lend!(Vec<f32>, |inverse: &mut Vec<f32>| {
        inverse.resize(vectors.count(x), 0.0);
        for_each_chunk(inverse, ROWS, |i, inverse| inverses(x, vectors, eps, i * ROWS, inverse));
        let inverse = &inverse[..];
        for_each_chunk(dw, COLUMNS, |i, dw| weight_columns(x, grad, vectors, inverse, i * COLUMNS, dw));
    })
}

per_isa! {
    fn inverses(x: &[f32], vectors: &Vectors, eps: f32, first: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = inverse_rms(&x[vectors.start(first + i)..][..vectors.dim], eps);
        }
    }
}

per_isa! {
    fn weight_columns(x: &[f32], grad: &[f32], vectors: &Vectors, inverse: &[f32], column: usize, dw: &mut [f32]) {
        for (i, &r) in inverse.iter().enumerate() {
            let at = vectors.start(i) + column;
            let (x, grad) = (&x[at..][..dw.len()], &grad[at..][..dw.len()]);
            for i in 0..dw.len() {
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

/// Backward pass of [`layer_norm`]: adds the gradients of `x`, `w` and `b` to `dx`, `dw` and `db`, given `grad`, the gradient
/// of the output.
pub fn layer_norm_backward(
    x: &[f32],
    w: &[f32],
    eps: f32,
    grad: &[f32],
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
) {
    let (n, block) = (w.len(), block(x, w.len()));
    for_each_chunk(dx, block, |i, dx| layer_rows_backward(chunk(x, block, i), w, eps, chunk(grad, block, i), dx));
    lend!(Vec<(f32, f32)>, |known: &mut Vec<(f32, f32)>| {
        known.resize(x.len() / n.max(1), (0.0, 0.0));
        for_each_chunk(known, ROWS, |i, known| all_moments(chunk(x, ROWS * n, i), eps, known));
        let (known, dw, db) = (&known[..], Shared::new(dw), Shared::new(db));
        for_each(n.div_ceil(COLUMNS), |i| {
            let (at, len) = (i * COLUMNS, COLUMNS.min(n - i * COLUMNS));
            // SAFETY: no other task has these columns.
            let (dw, db) = unsafe { (dw.slice(at, len), db.slice(at, len)) };
            layer_columns(x, grad, n, known, at, dw, db);
        });
    })
}

/// RMSNorm, in place, of each head in `columns` of rows of `width`; a head has `w.len()` columns.
pub fn head_norm(x: &mut [f32], width: usize, columns: Range<usize>, w: &[f32], eps: f32) {
    for_each_chunk(x, block(x, width), |_, x| {
        for row in x.chunks_exact_mut(width) {
            heads(&mut row[columns.clone()], w, eps);
        }
    });
}

/// Backward pass of [`head_norm`]: replaces the gradient of its output, in `columns` of `grad`, by the gradient of its input
/// `before`, and adds the gradient of the weight to `dw`.
pub fn head_norm_backward(
    before: &[f32],
    width: usize,
    columns: Range<usize>,
    w: &[f32],
    eps: f32,
    grad: &mut [f32],
    dw: &mut [f32],
) {
    let vectors = Vectors { width, columns: columns.clone(), dim: w.len() };
    weight_gradient(before, grad, &vectors, eps, dw);
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

/// Mean of a row and the inverse of its standard deviation.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x) / n;
    let [squares] = sums([x], |[x]| [(x - mean) * (x - mean)]);
    (mean, 1.0 / (squares / n + eps).sqrt())
}

per_isa! {
    fn all_moments(x: &[f32], eps: f32, out: &mut [(f32, f32)]) {
        for (x, out) in x.chunks_exact(x.len() / out.len()).zip(out) {
            *out = moments(x, eps);
        }
    }
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
            let [plain, along] = sums([grad, w, x], |[g, w, x]| [g * w, g * w * (x - mean)]);
            let (plain, along) = (plain / n as f32, along / n as f32 * r * r);
            for i in 0..n {
                dx[i] += r * (grad[i] * w[i] - plain - (x[i] - mean) * along);
            }
        }
    }
}

per_isa! {
    /// Adds the gradients of weight and bias, from column `at` on. Each column is one chain in the order of the rows, of
    /// width `n`; `known` has each row's mean and inverse deviation.
    fn layer_columns(x: &[f32], grad: &[f32], n: usize, known: &[(f32, f32)], at: usize, dw: &mut [f32], db: &mut [f32]) {
        let db = &mut db[..dw.len()];
        for (row, &(mean, r)) in known.iter().enumerate() {
            let at = row * n + at;
            let (x, grad) = (&x[at..][..dw.len()], &grad[at..][..dw.len()]);
            for i in 0..dw.len() {
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
