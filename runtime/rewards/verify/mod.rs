//! Rewards that a program can verify, as functions: rules of `reward.rules`, and for scorers of a program's own.
//!
//! Where TRL has the same reward, the values are TRL's, checked by its own figures.

#[cfg(feature = "verify")]
pub mod json;
pub mod language;
pub mod length;
pub mod math;
pub mod repetition;
pub mod thinking;
