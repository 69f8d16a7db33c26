//! What runs on a GPU, without one: every kernel's source compiles for it, and computes what the CPU's kernels do.

mod compile;
mod emulator;
mod models;

pub use emulator::Emulator;

/// The emulated board, or a loud skip.
pub fn board() -> Option<std::sync::Arc<Emulator>> {
    if emulator::compiler().is_none() {
        crate::support::skipped!("no C++ compiler to run the GPU's kernels with");
        return None;
    }
    Some(Emulator::shared())
}
