//! The forward pass of generation in plain candle operations, for devices that this crate has no kernels for.

use candle_core::{DType, Device, IndexOp, Tensor};

use super::cache::Row;
use crate::error::Result;
use crate::model::Decoder;
use crate::ops::{self, attend_tail};

/// KV cache: keys and values of each slot and layer.
pub struct PlainCache {
    slots: Vec<Vec<Option<(Tensor, Tensor)>>>,
}

impl PlainCache {
    /// Empty slots.
    pub fn new(decoder: &Decoder, slots: usize) -> Self {
        Self { slots: vec![vec![None; decoder.architecture().layers]; slots] }
    }

    /// Copies the first `len` tokens of a slot to another.
    pub fn copy_prefix(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        self.slots[to] = self.slots[from]
            .iter()
            .map(|entry| entry.as_ref().map(|(k, v)| Ok((k.narrow(0, 0, len)?, v.narrow(0, 0, len)?))).transpose())
            .collect::<Result<_>>()?;
        Ok(())
    }
}

/// Runs rows through the model and returns the logits of those that want them, in order. Rows of one slot are adjacent
/// and in order of position.
pub fn forward(decoder: &Decoder, cache: &mut PlainCache, rows: &[Row]) -> Result<Vec<f32>> {
    let layers = decoder.layers();
    let ids: Vec<u32> = rows.iter().map(|r| r.token).collect();
    let positions: Vec<u32> = rows.iter().map(|r| r.position as u32).collect();
    let groups: Vec<&[Row]> = rows.chunk_by(|a, b| a.slot == b.slot).collect();
    let mut x = layers.embed(decoder.architecture(), &ids, &positions)?;
    for (layer, block) in layers.blocks.iter().enumerate() {
        let heads = decoder.architecture().attention(layer);
        x = block.forward(&x, &decoder.layer(layer, &positions), |q, k, v| {
            let mut attended = Vec::with_capacity(groups.len());
            let mut at = 0;
            for group in &groups {
                let part = |t: &Tensor| t.narrow(0, at, group.len());
                let entry = &mut cache.slots[group[0].slot][layer];
                let (keys, values) = match entry.take().filter(|_| group[0].position > 0) {
                    // A reused slot may hold later tokens of an earlier sequence.
                    Some((k0, v0)) => {
                        let seen = group[0].position;
                        (
                            Tensor::cat(&[&k0.narrow(0, 0, seen)?, &part(k)?], 0)?,
                            Tensor::cat(&[&v0.narrow(0, 0, seen)?, &part(v)?], 0)?,
                        )
                    }
                    None => (part(k)?, part(v)?),
                };
                attended.push(attend_tail(&part(q)?, &keys, &values, &heads)?);
                *entry = Some((keys, values));
                at += group.len();
            }
            Tensor::cat(&attended, 0)
        })?;
    }
    let wanted: Vec<u32> = rows.iter().enumerate().filter(|(_, r)| r.wants_logits).map(|(i, _)| i as u32).collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let x = x.i(&Tensor::new(wanted, decoder.device())?)?;
    let logits = decoder
        .softcapped(ops::linear(&layers.norm.forward(&x)?, &layers.head)?)?
        .to_dtype(DType::F32)?
        .to_device(&Device::Cpu)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}
