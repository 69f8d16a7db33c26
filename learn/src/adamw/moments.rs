//! AdamW's moments of each parameter, in 32, 16 or 8 bits.
//!
//! Moments of 16 and 8 bits are rounded stochastically: up with a probability proportional to the part that is cut off, so
//! that small changes are right on average. The random bits are a function of the step and the element's index alone.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::Result;

/// Type in which moments are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MomentType {
    /// The type of the parameter.
    #[default]
    Full,
    /// bfloat16.
    Bf16,
    /// Eight bits, with the largest magnitude of each block of 256 moments as its scale (block-wise, after Dettmers et al.
    /// 2022). The first moment has a sign, four bits of exponent and three of fraction; the second has no sign, five bits of
    /// exponent and three of fraction.
    Int8,
}

impl MomentType {
    /// Bits of one moment of an f32 parameter, scales included.
    pub fn bits(self) -> u64 {
        match self {
            Self::Full => 32,
            Self::Bf16 => 16,
            Self::Int8 => 8 + 32 / QUANTUM as u64,
        }
    }
}

/// Elements of a block that shares a scale.
pub const QUANTUM: usize = 256;

/// Both moments of one parameter.
pub struct Moments {
    /// Exponential average of the gradient.
    pub first: Moment,
    /// Exponential average of the squared gradient.
    pub second: Moment,
}

/// One moment: its values, and the scales of their blocks if the values are eight-bit codes.
pub struct Moment {
    /// Values in the parameter's shape, or eight-bit codes of them.
    pub values: Tensor,
    /// Scale of each block of [`QUANTUM`] codes; `None` if values are no codes.
    pub scales: Option<Tensor>,
}

impl Moment {
    fn zeros(var: &Tensor, kind: MomentType) -> Result<Self> {
        let dtype = match kind {
            MomentType::Full => var.dtype(),
            MomentType::Bf16 => DType::BF16,
            MomentType::Int8 => DType::U8,
        };
        let scales = match kind {
            MomentType::Int8 => Some(Tensor::zeros(var.elem_count().div_ceil(QUANTUM), DType::F32, var.device())?),
            _ => None,
        };
        Ok(Self { values: Tensor::zeros(var.shape(), dtype, var.device())?, scales })
    }
}

impl Moments {
    /// Zero moments of a parameter, or of a part of one.
    pub fn zeros(var: &Tensor, kind: MomentType) -> Result<Self> {
        Ok(Self { first: Moment::zeros(var, kind)?, second: Moment::zeros(var, kind)? })
    }
}

/// Thirty-two random bits from a seed: the finaliser of MurmurHash3.
#[inline(always)]
pub fn scramble(seed: u32) -> u32 {
    let mut h = seed;
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

/// Rounds `x` to one of the two nearest bfloat16 numbers, such that the mean over seeds is `x`, and returns its bits.
#[inline(always)]
pub fn round_stochastic(x: f32, seed: u32) -> u16 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(scramble(seed) & 0xffff);
    (if x.is_finite() { up } else { bits } >> 16) as u16
}

/// The upper twelve bits of 1.0: sign, exponent and three bits of fraction.
const ONE: u32 = 0x3f8;

/// Rounds a magnitude from 0 to 1 stochastically to one of `levels + 1` codes: 0 is zero, `levels` is 1, and neighbours differ
/// by an eighth of their power of two.
#[inline(always)]
pub fn encode(x: f32, levels: u32, seed: u32) -> u32 {
    let base = ONE - levels;
    let random = scramble(seed);
    let least = decode(1, levels);
    // Below the smallest magnitude: zero or the smallest.
    let small = u32::from((random >> 8) as f32 * (1.0 / (1u32 << 24) as f32) < x / least);
    let code = ((x.to_bits() + (random & 0xf_ffff)) >> 20).saturating_sub(base).clamp(1, levels);
    if x < least { small } else { code }
}

/// The magnitude of a code.
#[inline(always)]
pub fn decode(code: u32, levels: u32) -> f32 {
    if code == 0 { 0.0 } else { f32::from_bits((code + ONE - levels) << 20) }
}

/// Levels of codes that share the byte with a sign, and of codes that use the whole byte.
pub const SIGNED: u32 = 127;
pub const UNSIGNED: u32 = 255;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_hold_their_own_numbers_and_are_right_on_average() {
        for levels in [SIGNED, UNSIGNED] {
            for code in 0..=levels {
                assert_eq!(encode(decode(code, levels), levels, 77), code);
            }
            assert_eq!(decode(levels, levels), 1.0);
            for x in [0.9f32, 0.31, 1e-3, decode(1, levels) * 0.3] {
                let n = 40_000;
                let mean = (0..n).map(|i| f64::from(decode(encode(x, levels, i), levels))).sum::<f64>() / f64::from(n);
                assert!((mean / f64::from(x) - 1.0).abs() < 0.02, "{mean} for {x} in {levels} levels");
            }
        }
    }
}
