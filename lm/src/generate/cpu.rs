//! The forward pass of generation on the CPU: rows of any sequences against a preallocated cache.
//!
//! Weights are packed once per policy version; nothing is allocated per token but small scratch rows.

use rayon::prelude::*;

use super::cache::{Cache, Row};
use crate::cpu::{Buffers, PackedWeights, Rows, lookup};
use crate::error::Result;
use crate::kernels::gemm::{View, gemm};
use crate::kernels::{attention, norm};
use crate::model::Decoder;

/// Runs rows through the model, appends their keys and values to the cache, and returns the logits of the rows
/// that want them, in order.
pub fn forward<'a>(
    decoder: &Decoder,
    weights: &PackedWeights,
    cache: &mut Cache,
    rows: &[Row],
    b: &'a mut Buffers,
) -> Result<&'a [f32]> {
    let positions: Vec<u32> = rows.iter().map(|r| r.position as u32).collect();
    let pass = Rows::new(decoder, &positions);
    let (heads, hidden) = (pass.heads, decoder.architecture().hidden);
    lookup(&decoder.layers().embed, rows.iter().map(|r| r.token as usize), &mut b.x)?;
    for (layer, block) in weights.blocks.iter().enumerate() {
        block.forward(&pass, b, |qkv, attended| {
            cache.append(layer, rows, qkv);
            attend(cache, layer, rows, qkv, &heads, attended);
        });
    }
    let wanted = rows.iter().zip(b.x.chunks_exact(hidden)).filter(|(row, _)| row.wants_logits);
    b.projected.clear();
    wanted.for_each(|(_, x)| b.projected.extend_from_slice(x));
    b.normed.resize(b.projected.len(), 0.0);
    norm::rms_norm(&b.projected, &weights.norm, pass.eps, &mut b.normed);
    let wanted = b.projected.len() / hidden;
    b.logits.resize(wanted * weights.head.cols(), 0.0);
    gemm(View::new(&b.normed, wanted, hidden), &weights.head, &mut b.logits, false);
    Ok(&b.logits)
}

/// One task for each row and key head, whose query heads are neighbours in the output.
fn attend(cache: &Cache, layer: usize, rows: &[Row], qkv: &[f32], heads: &attention::Heads, out: &mut [f32]) {
    out.par_chunks_mut(heads.group() * heads.dim).enumerate().for_each_init(
        || vec![0.0; cache.capacity()],
        |scores, (task, out)| {
            let (row, head) = (task / heads.keys, task % heads.keys);
            let queries = &qkv[row * heads.width() + head * heads.group() * heads.dim..];
            let (keys, values) = cache.head(layer, rows[row].slot, head);
            let position = rows[row].position;
            let (first, len) = (heads.first_key(position), position + 1);
            for (query, out) in queries.chunks_exact(heads.dim).zip(out.chunks_exact_mut(heads.dim)) {
                attention::attend(query, keys, cache.capacity(), values, heads.dim, first, len, heads, scores, out);
            }
        },
    );
}
