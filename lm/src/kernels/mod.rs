//! CPU kernels over plain slices: deterministic, batch-invariant, the same bits on every instruction set.
//!
//! Three rules make every promise about reproducibility true from here up:
//!
//! 1. An element of a matrix product is **one chain of fused multiply-adds in the order of the summed
//!    index**. Tiling, threads and batch composition choose who computes a chain, never its order.
//! 2. Reductions over a row run over sixteen fixed lanes and combine them in a fixed tree.
//! 3. Work is split between threads by output, never by summand.
//!
//! A fused multiply-add rounds once everywhere, so AVX2, AVX-512, NEON and the portable code agree bit for bit.
//!
//! Loops are split by [`team`], and by nothing else.

pub mod activation;
pub mod attention;
pub mod gemm;
pub mod head;
mod isa;
pub mod math;
pub mod norm;
pub mod rope;
mod shared;
pub mod team;

pub use isa::Isa;
pub use shared::Shared;
