//! The backward pass of attention over packed sequences. It recomputes the scores.

use std::ops::Range;

use super::family::Family;
use super::heads::Heads;
use super::scratch::{Scratch, blocks, columns, for_each_task, rows};
use crate::gemm::{View, gemm_serial, gemm_shared};
use crate::isa::per_isa;
use crate::math::{dot, exp_row, softcap_scaled};
use crate::shared::Shared;

/// Inputs of [`backward`].
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Queries, keys and values side by side, `[tokens, heads.width()]`.
    pub qkv: &'a [f32],
    /// Output of the forward pass, `[tokens, queries * dim]`.
    pub out: &'a [f32],
    /// Log-sum-exp of each row's scores, `[tokens, queries]`, as the forward pass wrote it.
    pub lse: &'a [f32],
    /// Gradient of the output.
    pub grad: &'a [f32],
}

/// Computes `d_qkv`, the gradient of `qkv`.
pub fn backward(saved: Saved<'_>, families: &[Family], heads: &Heads, d_qkv: &mut [f32]) {
    let d_qkv = Shared::new(d_qkv);
    for_each_task(families, heads, |family, head, scratch| {
        // SAFETY: only this task writes the family's rows in these heads' columns.
        unsafe { backward_family(saved, family, head, heads, d_qkv, scratch) };
    });
}

/// # Safety
/// The family's rows, in the columns of the heads that share key head `head` and of its keys and values, belong to
/// the caller.
unsafe fn backward_family(
    saved: Saved<'_>,
    family: &Family,
    head: usize,
    heads: &Heads,
    d_qkv: Shared<'_>,
    scratch: &mut Scratch,
) {
    let (d, width) = (heads.dim, heads.width());
    let (key_at, value_at) = columns(head, heads);
    let longest = family.completions.iter().map(Range::len).max().unwrap_or(0);
    let past = family.prompt.len();
    for sums in [&mut scratch.d_keys, &mut scratch.d_values] {
        sums.clear();
        sums.resize((past + longest) * d, 0.0);
    }
    for (index, (before, part)) in family.parts().enumerate() {
        let own = |at: usize| rows(saved.qkv, width, &part, at, d);
        scratch.keys_t.set(before.len(), own(key_at).t());
        scratch.values_t.set(before.len(), own(value_at).t());
        scratch.keys.set(before.len(), own(key_at));
        for block in blocks(&part) {
            for query in head * heads.group()..(head + 1) * heads.group() {
                // SAFETY: the caller's promise.
                unsafe { backward_block(saved, &before, &part, &block, query, heads, d_qkv, scratch) };
            }
        }
        // A completion's sums are complete; the prompt's grow until the last completion has been added.
        if index > 0 {
            // SAFETY: the caller's promise.
            unsafe { store(scratch, past, &part, (key_at, value_at), heads, d_qkv) };
            scratch.d_keys[past * d..].fill(0.0);
            scratch.d_values[past * d..].fill(0.0);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(scratch, 0, &family.prompt, (key_at, value_at), heads, d_qkv) };
}

/// Writes the gradients of a part's keys and values to `d_qkv`. They start at row `at` of the sums in `scratch`.
///
/// # Safety
/// The rows of `part` in those columns belong to the caller.
unsafe fn store(
    scratch: &Scratch,
    at: usize,
    part: &Range<usize>,
    (key_at, value_at): (usize, usize),
    heads: &Heads,
    d_qkv: Shared<'_>,
) {
    let (d, width) = (heads.dim, heads.width());
    for (i, row) in part.clone().enumerate() {
        let source = (at + i) * d..(at + i + 1) * d;
        // SAFETY: the caller's promise.
        unsafe {
            d_qkv.slice(row * width + key_at, d).copy_from_slice(&scratch.d_keys[source.clone()]);
            d_qkv.slice(row * width + value_at, d).copy_from_slice(&scratch.d_values[source]);
        }
    }
}

/// # Safety
/// The rows of `block`, in the columns of head `query`, belong to the caller.
#[allow(clippy::too_many_arguments)]
unsafe fn backward_block(
    saved: Saved<'_>,
    before: &Range<usize>,
    part: &Range<usize>,
    block: &Range<usize>,
    query: usize,
    heads: &Heads,
    d_qkv: Shared<'_>,
    scratch: &mut Scratch,
) {
    let (d, width, out_width) = (heads.dim, heads.width(), heads.query_width());
    let (n, past, seen) = (block.len(), before.len(), block.end - part.start);
    let stride = past + seen;
    let q = rows(saved.qkv, width, block, query * d, d);
    let grad = rows(saved.grad, out_width, block, query * d, d);
    let Scratch { keys_t, keys, values_t, queries, grads, scores, d_scores, d_keys, d_values, .. } = scratch;
    scores.resize(n * stride, 0.0);
    d_scores.resize(n * stride, 0.0);
    let (scores, d_scores) = (&mut scores[..n * stride], &mut d_scores[..n * stride]);
    for (x, sides, out) in [(q, &*keys_t, &mut *scores), (grad, &*values_t, &mut *d_scores)] {
        let (before, own) = sides.get(past);
        if let Some(before) = before {
            gemm_serial(x, before, out, stride, false);
        }
        gemm_serial(x, own.leading(d, seen), &mut out[past..], stride, false);
    }
    for (i, (row, ds)) in scores.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride)).enumerate() {
        let (token, position) = (block.start + i, past + block.start - part.start + i);
        let at = token * out_width + query * d..token * out_width + (query + 1) * d;
        let lse = saved.lse[token * heads.queries + query];
        let (grad, out) = (&saved.grad[at.clone()], &saved.out[at]);
        softmax_backward(row, ds, heads.first_key(position), position + 1, heads, lse, grad, out);
    }
    let (scores, d_scores) = (View::new(scores, n, stride), View::new(d_scores, n, stride));
    let target = d_qkv.from(block.start * width + query * d);
    let (before, own) = keys.get(past);
    // SAFETY: the caller's promise.
    unsafe {
        if let Some(before) = before {
            gemm_shared(d_scores.columns(0..past), before, target, width, false);
        }
        gemm_shared(d_scores.columns(past..stride), own.leading(seen, d), target, width, past > 0);
    }
    queries.fill(&[q], false);
    grads.fill(&[grad], false);
    gemm_serial(d_scores.t(), &*queries, d_keys, d, true);
    gemm_serial(scores.t(), &*grads, d_values, d, true);
}

per_isa! {
    /// Probabilities from scores (zeros outside `first..len`), and the scores' gradient from that of the
    /// probabilities in `ds`.
    fn softmax_backward(
        row: &mut [f32],
        ds: &mut [f32],
        first: usize,
        len: usize,
        heads: &Heads,
        lse: f32,
        grad: &[f32],
        out: &[f32],
    ) {
        for x in [&mut *row, &mut *ds] {
            x[..first].fill(0.0);
            x[len..].fill(0.0);
        }
        let (row, ds) = (&mut row[first..len], &mut ds[first..len]);
        let delta = dot(grad, out);
        match heads.softcap {
            None => {
                exp_row(row, heads.scale, lse);
                for (ds, &p) in ds.iter_mut().zip(row.iter()) {
                    *ds = p * (*ds - delta) * heads.scale;
                }
            }
            Some(cap) => {
                softcap_scaled(row, heads.scale, cap);
                for (ds, &softcapped) in ds.iter_mut().zip(row.iter()) {
                    let t = softcapped / cap;
                    *ds = (*ds - delta) * heads.scale * (1.0 - t * t);
                }
                exp_row(row, 1.0, lse);
                for (ds, &p) in ds.iter_mut().zip(row.iter()) {
                    *ds *= p;
                }
            }
        }
    }
}
