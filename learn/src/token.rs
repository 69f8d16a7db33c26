//! Sums of token values over sequences, and a stable log-sigmoid.

use candle_core::Tensor;

use crate::Result;

/// Sums `[sequences]` of a `[tokens]` tensor over sequences: sequence `s` is `spans[s]..spans[s + 1]`.
pub fn span_sums(values: &Tensor, spans: &[usize]) -> Result<Tensor> {
    let sums: Vec<Tensor> =
        spans.windows(2).map(|w| values.narrow(0, w[0], w[1] - w[0])?.sum_all()).collect::<candle_core::Result<_>>()?;
    Ok(Tensor::stack(&sums, 0)?)
}

/// `log σ(x)`, elementwise, with accurate value and gradient for every `x`.
///
/// Computed as `x - logsumexp(x, 0)` with the maximum as a constant. A form with `min` and `abs` has the wrong gradient
/// at exactly 0, where DPO starts, since the policy equals the reference.
pub fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let m = x.detach().relu()?;
    let lse = ((x - &m)?.exp()? + m.neg()?.exp()?)?.log()?;
    Ok((x - m)?.sub(&lse)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn log_sigmoid_has_the_right_gradient_everywhere() {
        let points = [-50.0f64, -3.0, 0.0, 1e-12, 3.0, 50.0];
        let x = Var::new(&points, &Device::Cpu).unwrap();
        let y = log_sigmoid(&x).unwrap();
        let grad = y.sum_all().unwrap().backward().unwrap().get(&x).unwrap().to_vec1::<f64>().unwrap();
        for ((x, y), g) in points.iter().zip(y.to_vec1::<f64>().unwrap()).zip(grad) {
            assert!((y - (-(-x).exp().ln_1p())).abs() < 1e-12, "value at {x}: {y}");
            assert!((g - 1.0 / (1.0 + x.exp())).abs() < 1e-12, "gradient at {x}: {g}");
        }
    }

    #[test]
    fn each_span_is_summed() {
        let values = Tensor::new(&[1.0f32, 2.0, 4.0, 8.0], &Device::Cpu).unwrap();
        assert_eq!(span_sums(&values, &[0, 1, 4]).unwrap().to_vec1::<f32>().unwrap(), [1.0, 14.0]);
    }
}
