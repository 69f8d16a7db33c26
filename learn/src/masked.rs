//! Statistics over a mask in which 1 means keep.

use candle_core::{D, Tensor};

use crate::Result;

/// `Σ(x·m) / Σm` over all elements.
pub fn mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    Ok((x * mask)?.sum_all()?.div(&mask.sum_all()?)?)
}

/// `Σ(x·m) / Σm` of each row `[rows, columns] -> [rows]`.
pub fn row_mean(x: &Tensor, mask: &Tensor) -> Result<Tensor> {
    Ok((x * mask)?.sum(D::Minus1)?.div(&mask.sum(D::Minus1)?)?)
}

/// Mean square distance to the masked mean; `unbiased` divides by `Σm - 1`.
pub fn variance(x: &Tensor, mask: &Tensor, unbiased: bool) -> Result<Tensor> {
    let biased = mean(&x.broadcast_sub(&mean(x, mask)?)?.sqr()?, mask)?;
    if !unbiased {
        return Ok(biased);
    }
    let n = mask.sum_all()?;
    Ok((biased * &n)?.div(&(n - 1.0)?)?)
}

/// `(x - μ) / sqrt(var + eps)`, plus μ again unless `shift_mean`. Elements outside the mask are transformed too,
/// as in TRL: mask the result where that matters.
pub fn whiten(x: &Tensor, mask: &Tensor, unbiased: bool, shift_mean: bool, eps: f64) -> Result<Tensor> {
    let mean = mean(x, mask)?;
    let std = (variance(x, mask, unbiased)? + eps)?.sqrt()?;
    let whitened = x.broadcast_sub(&mean)?.broadcast_div(&std)?;
    Ok(if shift_mean { whitened } else { whitened.broadcast_add(&mean)? })
}
