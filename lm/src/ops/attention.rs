//! Causal grouped-query attention over packed sequences.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, D, Device, Layout, Result, Shape, Tensor};

use super::{Kernels, floats, with_floats};
use crate::kernels::attention::{Heads, Saved, backward, forward};

/// The heads of a layer and where each packed sequence begins and ends.
#[derive(Clone)]
pub struct AttentionShape {
    /// Heads, scale and window.
    pub heads: Heads,
    /// Sequence `s` is the rows `offsets[s]..offsets[s + 1]`.
    pub offsets: Arc<Vec<usize>>,
}

/// `q` `[tokens, queries * dim]`, `k` and `v` `[tokens, keys * dim]`; a query sees its own sequence up to itself.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape, kernels: Kernels) -> Result<Tensor> {
    if kernels.fused(q) {
        let op = Attention { shape: shape.clone(), lse: OnceLock::new() };
        return q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op);
    }
    let outputs: Vec<Tensor> = shape
        .offsets
        .windows(2)
        .map(|w| {
            let part = |t: &Tensor| t.narrow(0, w[0], w[1] - w[0]);
            attend_tail(&part(q)?, &part(k)?, &part(v)?, &shape.heads)
        })
        .collect::<Result<_>>()?;
    Tensor::cat(&outputs, 0)
}

/// One sequence in plain candle, with its score matrix. The queries are the last rows of the sequence; keys and
/// values have all of its rows.
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
    let scores = (split(q, heads.queries)?.matmul(&repeat(k)?.t()?)? * heads.scale as f64)?;
    let hidden = |i: usize, j: usize| j > i || j < heads.first_key(i);
    let past = len - rows;
    let mask = (0..rows * len).map(|x| if hidden(past + x / len, x % len) { -1e30 } else { 0.0f32 }).collect();
    let mask = Tensor::from_vec(mask, (rows, len), &Device::Cpu)?.to_dtype(q.dtype())?.to_device(q.device())?;
    let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    p.matmul(&repeat(v)?)?.transpose(0, 1)?.contiguous()?.reshape((rows, heads.queries * heads.dim))
}

struct Attention {
    shape: AttentionShape,
    /// Log-sum-exp of each row's scores, kept by the forward pass for the backward.
    lse: OnceLock<Vec<f32>>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (floats(q, ql, "q")?, floats(k, kl, "k")?, floats(v, vl, "v")?);
        let (out, lse) = forward(q, k, v, &self.shape.offsets, &self.shape.heads);
        // The op runs forward once; a second run would compute the same values.
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(out), ql.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.get() else { candle_core::bail!("attention: backward before forward") };
        let (dq, dk, dv) = with_floats([q, k, v, out, &grad.contiguous()?], |[q, k, v, out, grad]| {
            Ok(backward(&Saved { q, k, v, out, lse, grad }, &self.shape.offsets, &self.shape.heads))
        })?;
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{check, random};

    #[test]
    fn fused_equals_plain() {
        for (queries, keys, dim, window) in
            [(4, 2, 8, None), (6, 2, 64, None), (2, 2, 6, Some(3)), (3, 1, 32, Some(70))]
        {
            let heads = Heads { queries, keys, dim, scale: 1.0 / (dim as f32).sqrt(), window };
            let shape = AttentionShape { heads, offsets: Arc::new(vec![0, 1, 9, 9 + 130]) };
            let tokens = 139;
            let inputs = [
                random(&[tokens, queries * dim], 1),
                random(&[tokens, keys * dim], 2),
                random(&[tokens, keys * dim], 3),
            ];
            check(|x, k| attention(&x[0], &x[1], &x[2], &shape, k), &inputs);
        }
    }
}
