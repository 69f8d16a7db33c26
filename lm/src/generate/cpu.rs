//! The forward pass of generation on the CPU: rows of any sequences over a preallocated KV cache.
//!
//! Weights are packed once per policy version; a pass allocates only small scratch buffers.

use std::sync::Arc;

use rehearsal_kernels::Shared;
use rehearsal_kernels::attention::{self, Heads, KEY_BLOCK};
use rehearsal_kernels::gemm::{Packed, View, gemm};
use rehearsal_kernels::math::softcap;
use rehearsal_kernels::team::{for_each_chunk, lend};

use super::cache::{Cache, Row};
use crate::cpu::{Cpu, Recorder, pack_into};
use crate::error::Result;
use crate::model::Decoder;
use crate::pass::{Buffers, Norm, Ops, PreparedBlock, Rows, norm};

/// The weights of a decoder, packed for GEMM.
pub struct PackedWeights {
    ops: Cpu,
    blocks: Vec<PreparedBlock<Cpu>>,
    norm: Norm<Vec<f32>>,
    head: Packed,
}

impl PackedWeights {
    /// Packs a decoder's current weights.
    pub fn new(decoder: &Decoder) -> Result<Self> {
        let (layers, ops) = (decoder.layers(), Cpu(decoder.precision()));
        let mut head = Packed::empty(decoder.precision());
        pack_into(&mut head, &[&layers.head], true)?;
        let blocks = layers.blocks.iter().map(|b| PreparedBlock::new(&ops, b)).collect::<candle_core::Result<_>>()?;
        Ok(Self { blocks, norm: norm(&ops, &layers.norm)?, head, ops })
    }
}

/// Buffers that passes reuse.
pub struct Room {
    pass: Buffers<Cpu>,
    wanted: Vec<f32>,
    logits: Vec<f32>,
}

impl Room {
    pub fn new(weights: &PackedWeights) -> Self {
        Self { pass: Buffers::new(&weights.ops), wanted: Vec::new(), logits: Vec::new() }
    }
}

/// Runs rows through the model, appends their keys and values to the cache, and returns the logits of the rows that
/// want them, in order, softcapped. The recorder, if there is one, records the activations.
pub fn forward<'a>(
    decoder: &Decoder,
    weights: &PackedWeights,
    cache: &mut Cache,
    rows: &[Row],
    room: &'a mut Room,
    mut recorder: Option<&mut Recorder>,
) -> Result<&'a [f32]> {
    let (arch, ops) = (decoder.architecture(), &weights.ops);
    let positions: Vec<u32> = rows.iter().map(|r| r.position as u32).collect();
    let ids: Vec<u32> = rows.iter().map(|r| r.token).collect();
    let pass = Rows::new(ops, decoder, &positions, &Arc::default())?;
    let b = &mut room.pass;
    ops.embed(decoder.layers(), decoder.embedding_scale(), &ids, &positions, &mut b.x)?;
    for (layer, block) in weights.blocks.iter().enumerate() {
        let heads = pass.heads(layer);
        let kept = recorder.as_mut().map(|recorder| recorder.layer(layer));
        block.forward(ops, &pass, layer, b, kept, |qkv, attended, lse| {
            attended.resize(rows.len() * heads.query_width(), 0.0);
            lse.resize(rows.len() * heads.queries, 0.0);
            cache.append(layer, rows, qkv);
            attend(cache, layer, rows, qkv, heads, attended, lse);
            Ok(())
        })?;
    }
    room.wanted.clear();
    let wanted = rows.iter().zip(b.x.chunks_exact(arch.hidden)).filter(|(row, _)| row.wants_logits);
    wanted.for_each(|(_, x)| room.wanted.extend_from_slice(x));
    if let Some(recorder) = recorder {
        recorder.end_pass(rows.len(), &room.wanted);
    }
    ops.norm(&room.wanted, &weights.norm, &mut b.normed)?;
    let wanted = room.wanted.len() / arch.hidden;
    room.logits.resize(wanted * weights.head.cols(), 0.0);
    gemm(View::new(&b.normed, wanted, arch.hidden), &weights.head, &mut room.logits, false);
    if let Some(cap) = arch.final_softcap {
        for_each_chunk(&mut room.logits, arch.vocab, |_, row| softcap(row, cap as f32));
    }
    Ok(&room.logits)
}

/// Attention over the cache, one task per row and key head; the query heads of a key head are adjacent in the output.
fn attend(cache: &Cache, layer: usize, rows: &[Row], qkv: &[f32], heads: &Heads, out: &mut [f32], lse: &mut [f32]) {
    let width = heads.group() * heads.dim;
    let lse = Shared::new(lse);
    for_each_chunk(out, width, |task, out| {
        let (row, head) = (task / heads.keys, task % heads.keys);
        let queries = &qkv[row * heads.width() + head * width..][..width];
        let (keys, values) = cache.head(layer, rows[row].slot, head);
        let position = rows[row].position;
        let (first, len) = (heads.first_key(position), position + 1);
        let (next_row, next_head) = ((task + 1) / heads.keys, (task + 1) % heads.keys);
        let next = rows.get(next_row).map_or(&[][..], |row| {
            let seen = heads.first_key(row.position) / KEY_BLOCK * KEY_BLOCK..row.position + 1;
            &cache.head(layer, row.slot, next_head).0[seen.start * heads.dim..seen.end * heads.dim]
        });
        // SAFETY: no two tasks have the same query heads.
        let lse = unsafe { lse.slice(task * heads.group(), heads.group()) };
        lend!(Vec<f32>, |scores: &mut Vec<f32>| {
            scores.resize(values.len() / heads.dim, 0.0);
            attention::attend(queries, keys, values, first, len, heads, next, scores, out, lse);
        });
    });
}
