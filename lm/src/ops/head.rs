//! The language-model head on chosen positions.

use candle_core::{D, DType, Result, Tensor, bail};

/// Log-probabilities `[rows]` of `targets` under `softmax(logits / temperature)`, in f32 or wider, from logits
/// `[rows, vocabulary]`.
pub fn logprobs(logits: &Tensor, targets: &[u32], temperature: f64) -> Result<Tensor> {
    let (rows, vocab) = logits.dims2()?;
    if rows != targets.len() {
        bail!("head: {rows} rows but {} targets", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocab) {
        bail!("head: target {target} is outside the vocabulary of {vocab}");
    }
    let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    candle_nn::ops::log_softmax(&(logits / temperature)?, D::Minus1)?.gather(&index, D::Minus1)?.squeeze(1)
}

/// `cap · tanh(logits / cap)`, if there is a cap (Gemma 2).
pub fn softcap(logits: Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        Some(cap) => (logits / cap)?.tanh()? * cap,
        None => Ok(logits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gemm::{Precision, View};
    use crate::kernels::head::{self, Saved, Targets};
    use crate::ops::linear;
    use crate::ops::twin::{close, floats, plain, random};

    #[test]
    fn the_kernel_equals_the_graph() {
        let tokens: Vec<u32> = (0..70).map(|i| (i * 371) % 5000).collect();
        for temperature in [1.0, 0.7] {
            let inputs = [random(&[70, 24], 1), random(&[5000, 24], 2)];
            let want = plain(|x| logprobs(&linear(&x[0], &x[1])?, &tokens, temperature), &inputs);
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
