//! Causal grouped-query attention over packed sequences.

use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor};
use rehearsal_kernels::attention::{Family, Heads};

/// Attention heads of a layer, and the packed sequences they run over.
#[derive(Clone)]
pub struct AttentionShape {
    /// Heads, scale, window and softcap.
    pub heads: Heads,
    /// Rows of each prompt and of the completions that share it.
    pub families: Arc<Vec<Family>>,
}

/// Attention `[tokens, queries * dim]` of `q` `[tokens, queries * dim]` over `k` and `v` `[tokens, keys * dim]`. A
/// query attends to its prompt and to its own completion, up to itself.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape) -> Result<Tensor> {
    let mut outputs = Vec::new();
    for Family { prompt, completions } in shape.families.iter() {
        let part = |t: &Tensor, rows: &std::ops::Range<usize>| t.narrow(0, rows.start, rows.len());
        if !prompt.is_empty() {
            outputs.push(attend_tail(&part(q, prompt)?, &part(k, prompt)?, &part(v, prompt)?, &shape.heads)?);
        }
        for rows in completions.iter().filter(|rows| !rows.is_empty()) {
            let seen = |t: &Tensor| -> Result<Tensor> {
                if prompt.is_empty() { part(t, rows) } else { Tensor::cat(&[part(t, prompt)?, part(t, rows)?], 0) }
            };
            outputs.push(attend_tail(&part(q, rows)?, &seen(k)?, &seen(v)?, &shape.heads)?);
        }
    }
    Tensor::cat(&outputs, 0)
}

/// Attention of the last rows of one sequence, `q` `[rows, queries * dim]`, over the keys and values of all its rows,
/// `[len, keys * dim]`, with the whole score matrix.
pub fn attend_tail(q: &Tensor, k: &Tensor, v: &Tensor, heads: &Heads) -> Result<Tensor> {
    let (rows, len) = (q.dim(0)?, k.dim(0)?);
    let split = |t: &Tensor, n: usize| t.reshape((t.dim(0)?, n, heads.dim))?.transpose(0, 1)?.contiguous();
    let repeat = |t: &Tensor| -> Result<Tensor> {
        split(t, heads.keys)?
            .unsqueeze(1)?
            .broadcast_as((heads.keys, heads.group(), len, heads.dim))?
            .reshape((heads.queries, len, heads.dim))?
            .contiguous()
    };
    let mut scores = (split(q, heads.queries)?.matmul(&repeat(k)?.t()?)? * heads.scale as f64)?;
    if let Some(cap) = heads.softcap {
        scores = ((scores / cap as f64)?.tanh()? * cap as f64)?;
    }
    let masked = |i: usize, j: usize| j > i || j < heads.first_key(i);
    let past = len - rows;
    let mask = (0..rows * len).map(|x| if masked(past + x / len, x % len) { -1e30 } else { 0.0f32 }).collect();
    let mask = Tensor::from_vec(mask, (rows, len), &Device::Cpu)?.to_dtype(q.dtype())?.to_device(q.device())?;
    let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    p.matmul(&repeat(v)?)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads.queries * heads.dim))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{close, floats, plain, random};
    use rehearsal_kernels::attention::{Saved, backward, forward};

    #[test]
    fn the_kernel_equals_the_graph() {
        for (queries, keys, dim, window, softcap) in [
            (4, 2, 8, None, None),
            (6, 2, 64, None, Some(3.0)),
            (2, 2, 6, Some(3), None),
            (3, 1, 32, Some(70), Some(20.0)),
        ] {
            let heads = Heads { queries, keys, dim, scale: 1.0 / (dim as f32).sqrt(), window, softcap };
            let families = vec![
                Family { prompt: 0..1, completions: vec![1..9, 9..9] },
                Family { prompt: 9..109, completions: vec![109..139, 139..139, 139..150] },
                Family { prompt: 150..150, completions: vec![150..155, 155..163] },
            ];
            let tokens = 163;
            let shape = AttentionShape { heads, families: Arc::new(families.clone()) };
            let inputs = [random(&[tokens, heads.width()], 1)];
            let want = plain(
                |x| {
                    let (q, kv) = (heads.query_width(), heads.key_width());
                    let part = |at, n| x[0].narrow(1, at, n);
                    attention(&part(0, q)?, &part(q, kv)?, &part(q + kv, kv)?, &shape)
                },
                &inputs,
            );
            let qkv = floats(&inputs[0]);
            let (mut out, mut lse) = (vec![0.0; tokens * heads.query_width()], vec![0.0; tokens * queries]);
            forward(&qkv, &families, &heads, &mut out, &mut lse);
            let mut d_qkv = vec![f32::NAN; qkv.len()];
            let saved = Saved { qkv: &qkv, out: &out, lse: &lse, grad: &want.upstream };
            backward(saved, &families, &heads, &mut d_qkv);
            close(&out, &want.output);
            close(&d_qkv, &want.gradients[0]);
        }
    }
}
