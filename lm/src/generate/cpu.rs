//! The forward pass of generation on the CPU: rows of any sequences against a preallocated cache.
//!
//! Weights are packed once per policy version; nothing is allocated per token but small scratch rows.

use rayon::prelude::*;

use super::cache::{Cache, Row};
use crate::error::Result;
use crate::kernels::gemm::{Packed, View, gemm};
use crate::kernels::{attention, norm, rope, swiglu};
use crate::model::{Block, Decoder, Layers, Projection};
use crate::ops::with_floats;

/// A decoder's weights in the layout of the skinny products of generation.
pub struct PackedWeights {
    blocks: Vec<PackedBlock>,
    norm: Vec<f32>,
    head: Packed,
}

struct PackedBlock {
    input_norm: Vec<f32>,
    qkv: PackedProjection,
    o: PackedProjection,
    post_norm: Vec<f32>,
    gate_up: PackedProjection,
    down: PackedProjection,
}

/// Projections side by side, as one product.
struct PackedProjection {
    weight: Packed,
    bias: Option<Vec<f32>>,
}

impl PackedProjection {
    fn new<const N: usize>(parts: [&Projection; N]) -> Result<Self> {
        let weight = with_floats(parts.map(|p| &p.weight), |slices| {
            let views: Vec<_> = slices
                .iter()
                .zip(parts)
                .map(|(data, p)| Ok(View::new(data, p.weight.dim(0)?, p.weight.dim(1)?).t()))
                .collect::<candle_core::Result<_>>()?;
            Ok(Packed::concat(&views))
        })?;
        let mut bias = Vec::new();
        for part in parts {
            if let Some(b) = &part.bias {
                bias.extend(b.to_vec1::<f32>()?);
            }
        }
        Ok(Self { weight, bias: (!bias.is_empty()).then_some(bias) })
    }

    fn apply(&self, x: &[f32], out: &mut Vec<f32>) {
        let rows = x.len() / self.weight.depth();
        out.resize(rows * self.weight.cols(), 0.0);
        gemm(View::new(x, rows, self.weight.depth()), &self.weight, out, false);
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len()) {
                for (x, b) in row.iter_mut().zip(bias) {
                    *x += b;
                }
            }
        }
    }
}

impl PackedWeights {
    /// Packs a CPU f32 decoder's weights as they are now.
    pub fn new(decoder: &Decoder) -> Result<Self> {
        let Layers { blocks, norm, head, .. } = decoder.layers();
        let block = |b: &Block| -> Result<PackedBlock> {
            Ok(PackedBlock {
                input_norm: b.input_norm.to_vec1()?,
                qkv: PackedProjection::new([&b.q, &b.k, &b.v])?,
                o: PackedProjection::new([&b.o])?,
                post_norm: b.post_norm.to_vec1()?,
                gate_up: PackedProjection::new([&b.gate, &b.up])?,
                down: PackedProjection::new([&b.down])?,
            })
        };
        let (vocab, width) = head.dims2()?;
        Ok(Self {
            blocks: blocks.iter().map(block).collect::<Result<_>>()?,
            norm: norm.to_vec1()?,
            head: with_floats([head], |[head]| Ok(Packed::new(View::new(head, vocab, width).t())))?,
        })
    }
}

/// Buffers of one forward pass, kept between passes.
#[derive(Default)]
pub struct Buffers {
    x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    projected: Vec<f32>,
    gate_up: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    mlp: Vec<f32>,
    logits: Vec<f32>,
}

/// Runs rows through the model, appends their keys and values to the cache, and returns the logits of the rows
/// that want them, in order.
pub fn forward<'a>(
    decoder: &Decoder,
    weights: &PackedWeights,
    cache: &mut Cache,
    rows: &[Row],
    buffers: &'a mut Buffers,
) -> Result<&'a [f32]> {
    let arch = decoder.architecture();
    let (hidden, eps, heads) = (arch.hidden, arch.norm_eps as f32, arch.attention());
    let (q, kv) = (heads.queries * heads.dim, heads.keys * heads.dim);
    let positions: Vec<u32> = rows.iter().map(|r| r.position as u32).collect();
    let b = buffers;

    b.x.resize(rows.len() * hidden, 0.0);
    with_floats([&decoder.layers().embed], |[embed]| {
        for (row, x) in rows.iter().zip(b.x.chunks_exact_mut(hidden)) {
            x.copy_from_slice(&embed[row.token as usize * hidden..(row.token as usize + 1) * hidden]);
        }
        Ok(())
    })?;
    b.normed.resize(rows.len() * hidden, 0.0);
    b.attended.resize(rows.len() * q, 0.0);

    for (layer, block) in weights.blocks.iter().enumerate() {
        norm::rms_norm(&b.x, &block.input_norm, eps, &mut b.normed);
        block.qkv.apply(&b.normed, &mut b.qkv);
        rope::rotate(&mut b.qkv, q + kv, decoder.angles(), &positions, false);
        for (row, qkv) in rows.iter().zip(b.qkv.chunks_exact(q + 2 * kv)) {
            cache.append(layer, row, &qkv[q..q + kv], &qkv[q + kv..]);
        }
        // One task for each row and key head, whose query heads are neighbours in the output.
        let (cache, width) = (&*cache, heads.group() * heads.dim);
        b.attended.par_chunks_mut(width).enumerate().for_each_init(
            || vec![0.0; cache.capacity()],
            |scores, (task, out)| {
                let (row, head) = (task / heads.keys, task % heads.keys);
                let qkv = &b.qkv[row * (q + 2 * kv)..];
                let (keys, values) = cache.head(layer, rows[row].slot, head);
                let position = rows[row].position;
                for (i, out) in out.chunks_exact_mut(heads.dim).enumerate() {
                    let at = (head * heads.group() + i) * heads.dim;
                    let query = &qkv[at..at + heads.dim];
                    attention::attend(
                        query,
                        keys,
                        cache.capacity(),
                        values,
                        heads.dim,
                        heads.first_key(position),
                        position + 1,
                        heads.scale,
                        scores,
                        out,
                    );
                }
            },
        );
        block.o.apply(&b.attended, &mut b.projected);
        add(&mut b.x, &b.projected);
        norm::rms_norm(&b.x, &block.post_norm, eps, &mut b.normed);
        block.gate_up.apply(&b.normed, &mut b.gate_up);
        let mlp = b.gate_up.len() / rows.len() / 2;
        b.gate.clear();
        b.up.clear();
        for row in b.gate_up.chunks_exact(2 * mlp) {
            b.gate.extend_from_slice(&row[..mlp]);
            b.up.extend_from_slice(&row[mlp..]);
        }
        b.mlp.resize(b.gate.len(), 0.0);
        swiglu::swiglu(&b.gate, &b.up, &mut b.mlp);
        block.down.apply(&b.mlp, &mut b.projected);
        add(&mut b.x, &b.projected);
    }

    let wanted: Vec<usize> = rows.iter().enumerate().filter(|(_, r)| r.wants_logits).map(|(i, _)| i).collect();
    b.projected.clear();
    for &i in &wanted {
        b.projected.extend_from_slice(&b.x[i * hidden..(i + 1) * hidden]);
    }
    b.normed.resize(b.projected.len(), 0.0);
    norm::rms_norm(&b.projected, &weights.norm, eps, &mut b.normed);
    b.logits.resize(wanted.len() * weights.head.cols(), 0.0);
    gemm(View::new(&b.normed, wanted.len(), hidden), &weights.head, &mut b.logits, false);
    Ok(&b.logits)
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
