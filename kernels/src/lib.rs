//! What model and optimizer code share below any model: counter-based random numbers.
//!
//! This crate knows no model, objective, actor, store or log.

pub mod random;
