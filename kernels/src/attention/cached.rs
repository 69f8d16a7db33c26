//! Attention of one new token against the KV cache.

use super::heads::{Heads, KEY_BLOCK, softmax};
use crate::isa::{per_isa, prefetch};

/// Keys that are scored together, at least: the elements of a vector.
const LANES: usize = 16;

per_isa! {
    /// Attention of the query heads that share a key head, against the keys `first..len` of a cache.
    ///
    /// `queries` and `out` are `[query heads][dim]`; `keys` is `[blocks][dim][KEY_BLOCK]` and `values` is
    /// `[blocks * KEY_BLOCK][dim]`. `scores` is scratch of at least [`KEY_BLOCK`] elements per block. `lse` receives the
    /// log-sum-exp of each query's scores. `next` is memory that is read after this call; it is prefetched.
    pub fn attend(
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        first: usize,
        len: usize,
        heads: &Heads,
        next: &[f32],
        scores: &mut [f32],
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        let dim = heads.dim;
        for (i, (query, out)) in queries.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
            // The first query prefetches the values while it reads the keys, and `next` while it reads the values. The other
            // queries find both in the cache.
            let (coming, next) = if i == 0 { (&values[..len * dim], next) } else { (&[][..], &[][..]) };
            products(query, keys, coming, first, len, scores);
            let row = &mut scores[first..len];
            let (top, total) = softmax(row, heads);
            lse[i] = top + total.ln();
            weighted_sum(row, &values[first * dim..], next, out);
            let inverse = 1.0 / total;
            for x in out.iter_mut() {
                *x *= inverse;
            }
        }
    }
}

/// `out[j] = Σ_d x[d] * keys[j][d]` for the blocks that cover `first..len`. `coming` has the layout of the keys and is
/// prefetched block by block.
#[inline(always)]
fn products(x: &[f32], keys: &[f32], coming: &[f32], first: usize, len: usize, out: &mut [f32]) {
    for block in first / KEY_BLOCK..len.div_ceil(KEY_BLOCK) {
        let at = block * x.len() * KEY_BLOCK;
        let (keys, coming) = (&keys[at..], &coming[at.min(coming.len())..]);
        let out = &mut out[block * KEY_BLOCK..(block + 1) * KEY_BLOCK];
        match (len - block * KEY_BLOCK).div_ceil(LANES) {
            1 => block_products::<16>(x, keys, coming, out),
            2 => block_products::<32>(x, keys, coming, out),
            3 => block_products::<48>(x, keys, coming, out),
            _ => block_products::<64>(x, keys, coming, out),
        }
    }
}

/// The first `W` dot products of a block.
#[inline(always)]
fn block_products<const W: usize>(x: &[f32], keys: &[f32], coming: &[f32], out: &mut [f32]) {
    let mut lanes = [0.0f32; W];
    for ((d, &x), column) in x.iter().enumerate().zip(keys.as_chunks::<KEY_BLOCK>().0) {
        fetch::<KEY_BLOCK>(coming, d);
        for i in 0..W {
            lanes[i] = x.mul_add(column[i], lanes[i]);
        }
    }
    out[..W].copy_from_slice(&lanes);
}

/// Prefetches the `n`-th group of `W` floats of `coming`.
#[inline(always)]
fn fetch<const W: usize>(coming: &[f32], n: usize) {
    if let Some(part) = coming.get(n * W..(n + 1) * W) {
        part.iter().step_by(LANES).for_each(|x| prefetch(x));
    }
}

/// `out = Σ_j weights[j] * rows[j]`; each element is one chain in the order of `j`.
#[inline(always)]
fn weighted_sum(weights: &[f32], rows: &[f32], next: &[f32], out: &mut [f32]) {
    match out.len() {
        n if n % 64 == 0 => weighted_blocks::<64>(weights, rows, next, out),
        n if n % 32 == 0 => weighted_blocks::<32>(weights, rows, next, out),
        n if n % 8 == 0 => weighted_blocks::<8>(weights, rows, next, out),
        _ => weighted_blocks::<1>(weights, rows, next, out),
    }
}

#[inline(always)]
fn weighted_blocks<const W: usize>(weights: &[f32], rows: &[f32], next: &[f32], out: &mut [f32]) {
    let stride = out.len();
    for (block, out) in out.as_chunks_mut::<W>().0.iter_mut().enumerate() {
        let mut lanes = [0.0f32; W];
        for (j, &w) in weights.iter().enumerate() {
            if block == 0 {
                fetch::<W>(next, j);
            }
            let row: &[f32; W] = rows[j * stride + block * W..].first_chunk().expect("a whole row");
            for i in 0..W {
                lanes[i] = w.mul_add(row[i], lanes[i]);
            }
        }
        *out = lanes;
    }
}
