//! Attention of one new token against the keys and values of those before it.

use super::{Heads, KEY_BLOCK, softmax};
use crate::kernels::isa::{per_isa, prefetch};

/// Keys that are scored together at least: what a vector holds.
const LANES: usize = 16;

per_isa! {
    /// The queries of heads that share a key head, side by side, against the keys `first..len` of a cache; their results go to
    /// `out` alike.
    ///
    /// `keys` is `[blocks][dim][KEY_BLOCK]`, `values` `[blocks * KEY_BLOCK][dim]`. `scores` is scratch of at least [`KEY_BLOCK`]
    /// for each block. `next` is what is read after this: it is asked for meanwhile. `lse` takes the log-sum-exp of each query's
    /// scores.
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
            // The first query has the values fetched while it goes through the keys, and what comes next while it goes through
            // the values; the others find both near.
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

/// `out[j] = Σ_d x[d] * keys[j][d]` for the blocks that cover `first..len`. `coming` is laid out like the keys, block by block,
/// and is fetched at the same pace.
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

/// The first `W` products of a block.
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

/// Asks for the `n`-th `W` floats of what is coming.
#[inline(always)]
fn fetch<const W: usize>(coming: &[f32], n: usize) {
    if let Some(part) = coming.get(n * W..(n + 1) * W) {
        part.iter().step_by(LANES).for_each(|x| prefetch(x));
    }
}

/// `out = Σ_j weights[j] * rows[j]`, each element one chain in the order of `j`.
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
