//! Passes on a GPU, by kernels of our own and the vendor's matrix products.
//!
//! A [`Board`] is what a device does for us: memory, launches, products. There is one for CUDA (with the feature `cuda`),
//! and anything else that runs the kernels' sources can be one: the tests have a board that runs them on the CPU, thread by
//! thread, and hold whole models on it against the kernels of the CPU.
//!
//! Rows are f32 or, with [`Precision::Bf16`](crate::Precision::Bf16), bfloat16 wherever a product reads or writes them. The
//! residual stream, its gradient, log-sum-exps and all sums are f32. Sums are taken in a fixed order, so a pass gives
//! the same bits each time it is run on the same device; unlike on the CPU they may depend on the batch.

mod board;
mod buffer;
#[cfg(feature = "cuda")]
mod cuda;
mod layout;
mod machine;
mod ops;

pub use board::{Argument, Board, FILES, Factor, Launch, Memory, Narrow, Product, Recorded, Source};
pub(crate) use buffer::{Buffer, Fields, Pass};
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub(crate) use layout::Layout;
pub(crate) use machine::{Context, Gpu, Numbers, int, shape};
