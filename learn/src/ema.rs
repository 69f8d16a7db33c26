//! Exponential moving average of weights (InstructGPT, C.4: decay 0.992).

use candle_core::Tensor;

use crate::{Error, Result};

/// Returns the updated average, `decay · average + (1 - decay) · weight`; `decay` is from 0 to 1.
pub fn update(average: &Tensor, weight: &Tensor, decay: f64) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&decay) {
        return Err(Error::OutOfRange { name: "ema_decay", value: decay, range: "from 0 to 1" });
    }
    Ok(((average * decay)? + (weight * (1.0 - decay))?)?)
}
