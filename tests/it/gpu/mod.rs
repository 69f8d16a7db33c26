//! GPU code, tested without a GPU: every kernel's source compiles for one, and computes what the CPU kernels compute.

mod compile;
mod emulator;
mod models;

pub use emulator::Emulator;

/// The emulated GPU backend, or a skip with its reason.
pub fn backend() -> Option<std::sync::Arc<Emulator>> {
    if emulator::compiler().is_none() {
        crate::support::skipped!("no C++ compiler to build the GPU kernels for the CPU with");
        return None;
    }
    Some(Emulator::shared())
}
