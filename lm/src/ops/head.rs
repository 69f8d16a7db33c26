//! Log-probabilities and entropies of the language-model head.

use candle_core::{D, DType, Result, Tensor, bail};

/// Log-probabilities `[rows]` of `targets` under `softmax(logits / temperature)`, from logits `[rows, vocab]`, in f32
/// or f64. With `entropy`, the entropies of the rows follow: `[2 * rows]`.
pub fn logprobs(logits: &Tensor, targets: &[u32], temperature: f64, entropy: bool) -> Result<Tensor> {
    let (rows, vocab) = logits.dims2()?;
    if rows != targets.len() {
        bail!("log-probabilities: {rows} rows of logits, but {} targets", targets.len());
    }
    if let Some(target) = targets.iter().find(|&&t| t as usize >= vocab) {
        bail!("log-probabilities: target {target} is outside the vocabulary of {vocab} tokens");
    }
    let logits = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let logs = candle_nn::ops::log_softmax(&(logits / temperature)?, D::Minus1)?;
    let chosen = logs.gather(&index, D::Minus1)?.squeeze(1)?;
    if !entropy {
        return Ok(chosen);
    }
    let entropies = (logs.exp()? * &logs)?.sum(D::Minus1)?.neg()?;
    Tensor::cat(&[chosen, entropies], 0)
}

/// Softcaps logits: `cap · tanh(logits / cap)` (Gemma 2); without a cap, returns them as they are.
pub fn softcap(logits: Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        Some(cap) => (logits / cap)?.tanh()? * cap,
        None => Ok(logits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear;
    use crate::ops::twin::{close, floats, plain, random};
    use rehearsal_kernels::gemm::{Precision, View};
    use rehearsal_kernels::head::{self, Saved, Targets};

    #[test]
    fn the_kernel_equals_the_graph() {
        let tokens: Vec<u32> = (0..70).map(|i| (i * 371) % 5000).collect();
        for (temperature, cap) in [(1.0, None), (0.7, None), (0.9, Some(1.5))] {
            let inputs = [random(&[70, 24], 1), random(&[5000, 24], 2)];
            for entropy in [false, true] {
                let graph = |x: &[Tensor]| {
                    let logits = softcap(linear(&x[0], &x[1])?, cap)?;
                    logprobs(&logits, &tokens, temperature, entropy)
                };
                let want = plain(graph, &inputs);
                let (h, w) = (floats(&inputs[0]), floats(&inputs[1]));
                let weight = View::new(&w, 5000, 24);
                let softcap = cap.map(|cap| cap as f32);
                let targets = Targets { tokens: &tokens, temperature: temperature as f32, softcap };
                let (mut out, lse) = head::logprobs(&h, weight, targets, Precision::F32);
                let entropies = head::entropies(&h, weight, &lse, targets, Precision::F32);
                let (grad, d_entropy) = want.upstream.split_at(70);
                let saved = Saved { hidden: &h, lse: &lse, grad, entropy: entropy.then_some((&entropies, d_entropy)) };
                let mut dw = vec![0.0; w.len()];
                let dh = head::backward(&saved, weight, targets, &mut dw, Precision::F32);
                if entropy {
                    out.extend(&entropies);
                }
                close(&out, &want.output);
                close(&dh, &want.gradients[0]);
                close(&dw, &want.gradients[1]);
            }
        }
    }
}
