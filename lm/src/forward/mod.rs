//! Runs a decoder: log-probabilities, scores and logits, and [`Forward`] with its backward pass.
//!
//! A decoder's passes run on the CPU or a GPU by the kernels of this project (`pass`), or as candle graphs
//! where there are none for the device and type.

mod graph;
mod machine;
mod passes;

pub(crate) use machine::{Machine, machine};
pub use passes::Forward;

#[cfg(test)]
mod tests;
