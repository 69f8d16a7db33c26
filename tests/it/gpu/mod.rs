//! What runs on a GPU, without one: every kernel's source compiles for it, and computes what the CPU's kernels do.

mod compile;
mod emulator;
mod models;

pub use emulator::Emulator;

/// The emulated board, or a loud skip.
pub fn board() -> Option<std::sync::Arc<Emulator>> {
    if emulator::compiler().is_none() {
        let what = "no C++ compiler to run the GPU's kernels with";
        crate::support::parts::skip(crate::support::parts::Part::Cxx, what);
        return None;
    }
    Some(Emulator::shared())
}
