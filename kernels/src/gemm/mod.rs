//! Matrix products `C[m,n] = Σ_k A[m,k] B[k,n]`, with f32 sums and row-major results.
//!
//! Factors are read through strides and packed into panels, in f32 or rounded to bfloat16. An element of a result is the
//! same bits for any number of rows, columns or threads (see [the rules](crate)). A [`Packed`] right-hand side can be
//! kept and reused; its precision is that of the product.

mod bf16;
mod bf16_tile;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod packed;
mod panel;
mod product;
mod tile;
mod view;

pub use bf16::{round as round_bf16, round_row, widen as widen_bf16};
pub use pack::Element;
pub use packed::{Packed, Part, Precision};
pub use product::{gemm, gemm_serial, gemm_shared};
pub use view::View;
