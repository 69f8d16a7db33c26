//! The language-model head on chosen positions.

use candle_core::{D, DType, Result, Tensor, bail};

/// Log-probabilities `[rows]` of `targets` under `softmax(hidden · weightᵀ / temperature)`, in f32 or wider.
///
/// `hidden` is `[rows, width]`, `weight` `[vocabulary, width]`.
pub fn head_logprobs(hidden: &Tensor, weight: &Tensor, targets: &[u32], temperature: f64) -> Result<Tensor> {
    let vocab = weight.dim(0)?;
    if hidden.dim(0)? != targets.len() {
        bail!("head: {} rows but {} targets", hidden.dim(0)?, targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocab) {
        bail!("head: target {target} is outside the vocabulary of {vocab}");
    }
    let logits = hidden.matmul(&weight.t()?)?;
    let logits = if logits.dtype() == DType::F64 { logits } else { logits.to_dtype(DType::F32)? };
    let index = Tensor::new(targets, hidden.device())?.unsqueeze(1)?;
    candle_nn::ops::log_softmax(&(logits / temperature)?, D::Minus1)?.gather(&index, D::Minus1)?.squeeze(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gemm::{Precision, View};
    use crate::kernels::head::{self, Saved, Targets};
    use crate::ops::twin::{close, floats, plain, random};

    #[test]
    fn the_kernel_equals_the_graph() {
        let tokens: Vec<u32> = (0..70).map(|i| (i * 371) % 5000).collect();
        for temperature in [1.0, 0.7] {
            let inputs = [random(&[70, 24], 1), random(&[5000, 24], 2)];
            let want = plain(|x| head_logprobs(&x[0], &x[1], &tokens, temperature), &inputs);
            let (h, w) = (floats(&inputs[0]), floats(&inputs[1]));
            let weight = View::new(&w, 5000, 24);
            let targets = Targets { tokens: &tokens, temperature: temperature as f32 };
            let (out, lse) = head::logprobs(&h, weight, targets, Precision::F32);
            let mut dw = vec![0.0; w.len()];
            let saved = Saved { hidden: &h, lse: &lse, grad: &want.upstream };
            let dh = head::backward(&saved, weight, targets, &mut dw, Precision::F32);
            close(&out, &want.output);
            close(&dh, &want.gradients[0]);
            close(&dw, &want.gradients[1]);
        }
    }
}
