//! Masked statistics; 1 in the mask means keep.

use candle_core::{D, Tensor};

use crate::Result;

/// Mean over all elements: `Σ(x·m) / Σm`.
pub fn mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    Ok((x * mask)?.sum_all()?.div(&mask.sum_all()?)?)
}

/// Mean of each row, `[rows, columns] -> [rows]`: `Σ(x·m) / Σm`.
pub fn row_mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    Ok((x * mask)?.sum(D::Minus1)?.div(&mask.sum(D::Minus1)?)?)
}

/// Variance over all elements: `Σ((x - μ)²·m) / Σm`, or divided by `Σm - 1` if `unbiased`.
pub fn variance(x: &Tensor, mask: &Tensor, unbiased: bool) -> Result<Tensor> {
    let biased = mean(&x.broadcast_sub(&mean(x, mask)?)?.sqr()?, mask)?;
    if !unbiased {
        return Ok(biased);
    }
    let n = mask.sum_all()?;
    Ok((biased * &n)?.div(&(n - 1.0)?)?)
}

/// Whitens all elements: `(x - μ) / sqrt(var + eps)`, plus μ unless `shift_mean`. As in TRL, elements outside the mask
/// are transformed too; mask the result where that matters.
pub fn whiten(x: &Tensor, mask: &Tensor, unbiased: bool, shift_mean: bool, eps: f64) -> Result<Tensor> {
    let mean = mean(x, mask)?;
    let std = (variance(x, mask, unbiased)? + eps)?.sqrt()?;
    let whitened = x.broadcast_sub(&mean)?.broadcast_div(&std)?;
    Ok(if shift_mean { whitened } else { whitened.broadcast_add(&mean)? })
}
