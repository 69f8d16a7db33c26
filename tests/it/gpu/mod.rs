//! GPU code, tested without a GPU: every kernel's source compiles for one, and computes what the CPU kernels compute.

mod compile;
mod emulator;
mod models;

pub use emulator::Emulator;

/// The emulated GPU backend, or a skip with its reason.
pub fn backend() -> Option<std::sync::Arc<Emulator>> {
    if emulator::compiler().is_none() {
        let what = "no C++ compiler to run the GPU's kernels with";
        crate::support::parts::skip(crate::support::parts::Part::Cxx, what);
        return None;
    }
    Some(Emulator::shared())
}
