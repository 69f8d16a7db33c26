//! Kernels of Rehearsal: CPU kernels over plain slices, the GPU backend, and counter-based random numbers.
//!
//! This crate knows no model, objective, actor, store or log. It reads one clock: an idle worker of a
//! [thread team](team) spins, yields and then parks by elapsed time, which changes no result.
//!
//! CPU kernels are deterministic, batch-invariant, and give the same bits on every instruction set. Three rules make
//! every promise about reproducibility true from here up:
//!
//! 1. An element of a matrix product is **one chain of fused multiply-adds in the order of the summed index**. Tiles,
//!    threads and the batch decide who computes a chain, never its order.
//! 2. A reduction over a row runs over sixteen fixed lanes and combines them in a fixed tree.
//! 3. Work is split between threads by output element, never by summand.
//!
//! A fused multiply-add rounds once everywhere, so AVX2, AVX-512, NEON and the portable code agree bit for bit.
//!
//! Parallel loops of the CPU kernels are split by [`team`] alone.
//!
//! ```
//! use rehearsal_kernels::gemm::{Packed, Precision, View, gemm};
//!
//! // [2, 3] times [3, 1], packed once and used any number of times.
//! let b = Packed::new(View::new(&[1.0f32, 10.0, 100.0], 3, 1), Precision::F32);
//! let mut c = [0.0; 2];
//! gemm(View::new(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3), &b, &mut c, false);
//! assert_eq!(c, [321.0, 654.0]);
//! ```

pub mod activation;
pub mod attention;
pub mod gemm;
pub mod gpu;
pub mod head;
mod isa;
pub mod math;
pub mod norm;
pub mod random;
pub mod rope;
mod shared;
pub mod team;

pub use isa::Isa;
pub use shared::Shared;

/// Why computing is slow in this build; `None` in one whose kernels are optimised.
pub fn slow_build() -> Option<String> {
    slow_at(env!("REHEARSAL_OPT_LEVEL"))
}

fn slow_at(level: &str) -> Option<String> {
    matches!(level, "0" | "1").then(|| {
        format!(
            "the kernels are built with opt-level = {level}, which makes steps tens of times slower; build with \
             `--release`, or add `[profile.dev.package.\"*\"]` with `opt-level = 3` to the program's Cargo.toml"
        )
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_build_without_optimisation_says_what_to_do() {
        assert_eq!(super::slow_build(), None, "this workspace optimises its kernels in every profile");
        assert!(super::slow_at("0").unwrap().contains("[profile.dev.package.\"*\"]"));
        assert_eq!(super::slow_at("3"), None);
    }
}
