//! Normalisation of rows.

use std::ops::Range;

use super::Shared;
use super::isa::per_isa;
use super::math::{dot, sum, sums};
use super::team::{chunk, for_each, for_each_chunk, lend, share};

/// Rows a task takes at a time, at most.
const ROWS: usize = 32;

/// Columns of a weight's gradient that a task takes at a time.
const COLUMNS: usize = 64;

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

/// Where vectors that are normalised lie in a matrix: so many side by side in each row.
struct Vectors {
    width: usize,
    columns: Range<usize>,
    dim: usize,
}

impl Vectors {
    /// Whole rows.
    fn rows(dim: usize) -> Self {
        Self { width: dim, columns: 0..dim, dim }
    }

    fn count(&self, x: &[f32]) -> usize {
        x.len() / self.width.max(1) * self.per_row()
    }

    fn per_row(&self) -> usize {
        self.columns.len() / self.dim.max(1)
    }

    /// Where a vector begins.
    #[inline(always)]
    fn start(&self, vector: usize) -> usize {
        let (row, place) = (vector / self.per_row(), vector % self.per_row());
        row * self.width + self.columns.start + place * self.dim
    }
}

/// Adds the gradient of an RMSNorm's weight to `dw`, each column one chain over the vectors.
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
    let (n, block) = (w.len(), block(x, w.len()));
    for_each_chunk(dx, block, |i, dx| layer_rows_backward(chunk(x, block, i), w, eps, chunk(grad, block, i), dx));
    lend!(Vec<(f32, f32)>, |known: &mut Vec<(f32, f32)>| {
        known.resize(x.len() / n.max(1), (0.0, 0.0));
        for_each_chunk(known, ROWS, |i, known| all_moments(chunk(x, ROWS * n, i), eps, known));
        let (known, dw, db) = (&known[..], Shared::new(dw), Shared::new(db));
        for_each(n.div_ceil(COLUMNS), |i| {
            let (at, len) = (i * COLUMNS, COLUMNS.min(n - i * COLUMNS));
            // SAFETY: these columns are this task's.
            let (dw, db) = unsafe { (dw.slice(at, len), db.slice(at, len)) };
            layer_columns(x, grad, n, known, at, dw, db);
        });
    })
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

/// A row's mean and the inverse of its standard deviation.
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
    /// The gradients of weight and bias from column `at` on, each one chain over the rows of width `n`.
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
