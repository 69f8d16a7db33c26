//! Causal grouped-query attention, one query row at a time: scores live in a row of scratch and are never stored.
//!
//! Training (whole sequences) and generation (one new row against a cache) call the same [`attend`], so the
//! sampler's log-probabilities and the trainer's are the same bits.

use rayon::prelude::*;

use super::isa::per_isa;
use super::math::{dot, exp_row, max};

/// Keys are read in blocks of this many, so transposed keys have a stride that is a multiple of it.
pub const KEY_BLOCK: usize = 64;

/// Shape of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key and value heads; divides `queries`.
    pub keys: usize,
    /// Width of a head.
    pub dim: usize,
    /// Factor on the scores, usually `1 / sqrt(dim)`.
    pub scale: f32,
    /// A query sees at most this many keys, itself included; `None` sees all.
    pub window: Option<usize>,
}

impl Heads {
    /// Query heads that share a key head.
    pub fn group(&self) -> usize {
        self.queries / self.keys
    }

    /// First key that the query at `position` sees.
    pub fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

per_isa! {
    /// One query against the keys `first..len`; returns the log-sum-exp of its scaled scores.
    ///
    /// `keys` is transposed, `[dim][key_stride]`, with `key_stride` a multiple of [`KEY_BLOCK`]; `values` has a
    /// row every `value_stride`. `scores` is scratch of at least `key_stride`; on return it holds, at
    /// `first..len`, the unnormalised probabilities.
    pub fn attend(
        query: &[f32],
        keys: &[f32],
        key_stride: usize,
        values: &[f32],
        value_stride: usize,
        first: usize,
        len: usize,
        scale: f32,
        scores: &mut [f32],
        out: &mut [f32],
    ) -> f32 {
        products(query, keys, key_stride, first, len, scores);
        let row = &mut scores[first..len];
        let top = max(row) * scale;
        let total = exp_row(row, scale, top);
        weighted_sum(row, &values[first * value_stride..], value_stride, out);
        let inverse = 1.0 / total;
        for x in out.iter_mut() {
            *x *= inverse;
        }
        top + total.ln()
    }
}

/// `out[j] = Σ_d x[d] * columns[d][j]` for the blocks that cover `first..len`.
#[inline(always)]
fn products(x: &[f32], columns: &[f32], stride: usize, first: usize, len: usize, out: &mut [f32]) {
    let mut j = first / KEY_BLOCK * KEY_BLOCK;
    while j < len {
        let mut lanes = [0.0f32; KEY_BLOCK];
        for (d, &x) in x.iter().enumerate() {
            let column: &[f32; KEY_BLOCK] = columns[d * stride + j..].first_chunk().expect("keys padded to the block");
            for i in 0..KEY_BLOCK {
                lanes[i] = x.mul_add(column[i], lanes[i]);
            }
        }
        out[j..j + KEY_BLOCK].copy_from_slice(&lanes);
        j += KEY_BLOCK;
    }
}

/// `out = Σ_j weights[j] * rows[j]`, each element one chain in the order of `j`.
#[inline(always)]
fn weighted_sum(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    match out.len() {
        n if n % 64 == 0 => weighted_blocks::<64>(weights, rows, stride, out),
        n if n % 32 == 0 => weighted_blocks::<32>(weights, rows, stride, out),
        n if n % 8 == 0 => weighted_blocks::<8>(weights, rows, stride, out),
        _ => weighted_blocks::<1>(weights, rows, stride, out),
    }
}

#[inline(always)]
fn weighted_blocks<const W: usize>(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    for (block, out) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
        let mut lanes = [0.0f32; W];
        for (j, &w) in weights.iter().enumerate() {
            let row: &[f32; W] = rows[j * stride + block * W..].first_chunk().expect("a whole row");
            for i in 0..W {
                lanes[i] = w.mul_add(row[i], lanes[i]);
            }
        }
        *out = lanes;
    }
}

/// `rows[j] += weights[j] * x` for every `j`.
#[inline(always)]
fn rank_one(weights: &[f32], x: &[f32], rows: &mut [f32]) {
    for (row, &w) in rows.chunks_exact_mut(x.len()).zip(weights) {
        for (r, &x) in row.iter_mut().zip(x) {
            *r = w.mul_add(x, *r);
        }
    }
}

/// Transposes rows `[len][stride]`, of which `dim` columns from `column` on are wanted, to `[dim][padded len]`.
fn transposed(x: &[f32], stride: usize, column: usize, dim: usize, len: usize) -> (Vec<f32>, usize) {
    let padded = len.next_multiple_of(KEY_BLOCK);
    let mut out = vec![0.0; dim * padded];
    for j in 0..len {
        let row = &x[j * stride + column..j * stride + column + dim];
        for (d, &value) in row.iter().enumerate() {
            out[d * padded + j] = value;
        }
    }
    (out, padded)
}

/// Every (sequence, key head) pair: the unit of work between threads.
fn tasks(offsets: &[usize], heads: &Heads) -> Vec<(usize, usize, usize)> {
    offsets.windows(2).flat_map(|w| (0..heads.keys).map(move |h| (w[0], w[1], h))).collect()
}

/// Attention over packed sequences: `q` `[tokens, queries * dim]`, `k` and `v` `[tokens, keys * dim]`, sequence `s`
/// at tokens `offsets[s]..offsets[s + 1]`. Returns the output, shaped as `q`, and the log-sum-exp `[tokens, queries]`.
pub fn forward(q: &[f32], k: &[f32], v: &[f32], offsets: &[usize], heads: &Heads) -> (Vec<f32>, Vec<f32>) {
    let (d, g) = (heads.dim, heads.group());
    let (q_stride, k_stride) = (heads.queries * d, heads.keys * d);
    let parts: Vec<_> = tasks(offsets, heads)
        .into_par_iter()
        .with_max_len(1)
        .map(|(from, to, head)| {
            let len = to - from;
            let (keys, stride) = transposed(&k[from * k_stride..to * k_stride], k_stride, head * d, d, len);
            let values = &v[from * k_stride + head * d..];
            let mut scores = vec![0.0; stride];
            let (mut out, mut lse) = (vec![0.0; len * g * d], vec![0.0; len * g]);
            for i in 0..len {
                for j in 0..g {
                    let at = (from + i) * q_stride + (head * g + j) * d;
                    let row = &mut out[(i * g + j) * d..(i * g + j + 1) * d];
                    lse[i * g + j] = attend(
                        &q[at..at + d],
                        &keys,
                        stride,
                        values,
                        k_stride,
                        heads.first_key(i),
                        i + 1,
                        heads.scale,
                        &mut scores,
                        row,
                    );
                }
            }
            (from, head, out, lse)
        })
        .collect();
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / d]);
    for (from, head, part, part_lse) in parts {
        scatter(&part, g * d, &mut out[from * q_stride..], q_stride, head * g * d);
        scatter(&part_lse, g, &mut lse[from * heads.queries..], heads.queries, head * g);
    }
    (out, lse)
}

/// Copies rows of width `width` to the columns from `column` on of rows of width `stride`.
fn scatter(rows: &[f32], width: usize, out: &mut [f32], stride: usize, column: usize) {
    for (i, row) in rows.chunks_exact(width).enumerate() {
        out[i * stride + column..i * stride + column + width].copy_from_slice(row);
    }
}

/// What the backward pass reads: the operands, results and the gradient of the output.
pub struct Saved<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
    pub grad: &'a [f32],
}

/// Gradients with respect to `q`, `k` and `v`; scores are computed again from the log-sum-exp.
pub fn backward(saved: &Saved<'_>, offsets: &[usize], heads: &Heads) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (d, g) = (heads.dim, heads.group());
    let (q_stride, k_stride) = (heads.queries * d, heads.keys * d);
    let parts: Vec<_> = tasks(offsets, heads)
        .into_par_iter()
        .with_max_len(1)
        .map(|(from, to, head)| (from, head, sequence_backward(saved, from, to, head, heads)))
        .collect();
    let mut dq = vec![0.0; saved.q.len()];
    let (mut dk, mut dv) = (vec![0.0; saved.k.len()], vec![0.0; saved.v.len()]);
    for (from, head, [q, k, v]) in parts {
        scatter(&q, g * d, &mut dq[from * q_stride..], q_stride, head * g * d);
        scatter(&k, d, &mut dk[from * k_stride..], k_stride, head * d);
        scatter(&v, d, &mut dv[from * k_stride..], k_stride, head * d);
    }
    (dq, dk, dv)
}

/// One sequence and key head: gradients `[len][group][dim]`, `[len][dim]`, `[len][dim]`.
fn sequence_backward(saved: &Saved<'_>, from: usize, to: usize, head: usize, heads: &Heads) -> [Vec<f32>; 3] {
    let (d, g, len) = (heads.dim, heads.group(), to - from);
    let (q_stride, k_stride) = (heads.queries * d, heads.keys * d);
    let (keys, stride) = transposed(&saved.k[from * k_stride..to * k_stride], k_stride, head * d, d, len);
    let (values, _) = transposed(&saved.v[from * k_stride..to * k_stride], k_stride, head * d, d, len);
    let key_rows = &saved.k[from * k_stride + head * d..];
    let (mut dq, mut dk, mut dv) = (vec![0.0; len * g * d], vec![0.0; len * d], vec![0.0; len * d]);
    let (mut p, mut ds) = (vec![0.0; stride], vec![0.0; stride]);
    for i in 0..len {
        for j in 0..g {
            let at = (from + i) * q_stride + (head * g + j) * d;
            row_backward(
                &saved.q[at..at + d],
                &saved.grad[at..at + d],
                &saved.out[at..at + d],
                saved.lse[(from + i) * heads.queries + head * g + j],
                (&keys, &values, stride),
                (key_rows, k_stride),
                heads.first_key(i)..i + 1,
                heads.scale,
                (&mut p, &mut ds),
                &mut dq[(i * g + j) * d..(i * g + j + 1) * d],
                (&mut dk, &mut dv),
            );
        }
    }
    [dq, dk, dv]
}

per_isa! {
    fn row_backward(
        query: &[f32],
        grad: &[f32],
        out: &[f32],
        lse: f32,
        columns: (&[f32], &[f32], usize),
        key_rows: (&[f32], usize),
        seen: std::ops::Range<usize>,
        scale: f32,
        scratch: (&mut [f32], &mut [f32]),
        dq: &mut [f32],
        sums: (&mut [f32], &mut [f32]),
    ) {
        let (keys, values, stride) = columns;
        let (p, ds) = scratch;
        let (dk, dv) = sums;
        let d = query.len();
        products(query, keys, stride, seen.start, seen.end, p);
        products(grad, values, stride, seen.start, seen.end, ds);
        let (p, ds) = (&mut p[seen.clone()], &mut ds[seen.clone()]);
        exp_row(p, scale, lse);
        let delta = dot(grad, out);
        for (ds, &p) in ds.iter_mut().zip(p.iter()) {
            *ds = p * (*ds - delta) * scale;
        }
        weighted_sum(ds, &key_rows.0[seen.start * key_rows.1..], key_rows.1, dq);
        rank_one(ds, query, &mut dk[seen.start * d..seen.end * d]);
        rank_one(p, grad, &mut dv[seen.start * d..seen.end * d]);
    }
}
