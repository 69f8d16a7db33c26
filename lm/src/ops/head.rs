//! The language-model head on chosen positions: linear, log-softmax and gather as one operation.

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};

use super::{Kernels, floats, with_floats};
use crate::kernels::gemm::{Packed, View};
use crate::kernels::head;

/// Log-probabilities `[rows]` of `targets` under `softmax(hidden · weightᵀ / temperature)`.
///
/// `hidden` is `[rows, width]`, `weight` `[vocabulary, width]`.
pub fn head_logprobs(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    temperature: f64,
    kernels: Kernels,
) -> Result<Tensor> {
    let vocab = weight.dim(0)?;
    if hidden.dim(0)? != targets.len() {
        bail!("head: {} rows but {} targets", hidden.dim(0)?, targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocab) {
        bail!("head: target {target} is outside the vocabulary of {vocab}");
    }
    if kernels.fused(hidden) {
        let op = Head { targets: Arc::new(targets.to_vec()), temperature: temperature as f32, lse: OnceLock::new() };
        return hidden.contiguous()?.apply_op2(&weight.contiguous()?, op);
    }
    let logits = (hidden.matmul(&weight.t()?)? / temperature)?;
    let index = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
    candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&index, D::Minus1)?.squeeze(1)
}

struct Head {
    targets: Arc<Vec<u32>>,
    temperature: f32,
    lse: OnceLock<Vec<f32>>,
}

impl CustomOp2 for Head {
    fn name(&self) -> &'static str {
        "head-logprobs"
    }

    fn cpu_fwd(&self, h: &CpuStorage, hl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (vocab, width) = wl.shape().dims2()?;
        let weight = Packed::new(View::new(floats(w, wl, "weight")?, vocab, width).t());
        let (out, lse) = head::logprobs(floats(h, hl, "hidden")?, &weight, &self.targets, self.temperature);
        let _ = self.lse.set(lse);
        Ok((CpuStorage::F32(out), self.targets.len().into()))
    }

    fn bwd(&self, h: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.get() else { bail!("head: backward before forward") };
        let (vocab, width) = w.dims2()?;
        let trained = w.track_op();
        let (dh, dw) = with_floats([h, w, &grad.contiguous()?], |[h, w, g]| {
            let weight = View::new(w, vocab, width);
            Ok(head::backward(h, weight, &self.targets, self.temperature, lse, g, width, trained))
        })?;
        let dw = dw.map(|dw| Tensor::from_vec(dw, w.shape(), w.device())).transpose()?;
        Ok((Some(Tensor::from_vec(dh, h.shape(), h.device())?), dw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::twin::{check, random};

    #[test]
    fn fused_equals_plain() {
        let targets: Vec<u32> = (0..70).map(|i| (i * 37) % 130).collect();
        for temperature in [1.0, 0.7] {
            check(
                |x, k| head_logprobs(&x[0], &x[1], &targets, temperature, k),
                &[random(&[70, 24], 1), random(&[130, 24], 2)],
            );
        }
    }
}
