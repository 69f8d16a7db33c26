//! Passes of a model on a GPU: [`pass`](crate::pass)'s operations as launches of the GPU kernels and matrix products of
//! the [backend](rehearsal_kernels::gpu).

mod machine;
mod ops;

pub use machine::{Gpu, Numbers, int, shape};
