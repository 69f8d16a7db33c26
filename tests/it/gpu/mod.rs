//! GPU code: every kernel's source compiles for a GPU and computes what the CPU's kernels compute, on an emulated GPU or on the
//! one that `REHEARSAL_GPU` names (`cuda:0`, in a build with the feature `cuda`).

#[cfg(feature = "cuda")]
mod card;
mod compile;
mod emulator;
mod models;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use rehearsal::lm::Decoder;
use rehearsal_kernels::gpu::GpuBackend;

use crate::support::jobs::gpu;
use crate::support::parts::{Part, skip};
pub use emulator::Emulator;

/// The GPU that tests run on.
#[derive(Clone)]
pub struct Board {
    pub backend: Arc<dyn GpuBackend>,
    pub device: Device,
}

impl Board {
    /// A model with its weights on the GPU; its passes run there.
    pub fn on(&self, decoder: &Decoder) -> Decoder {
        if self.device.is_cpu() {
            return decoder.clone().with_gpu_backend(self.backend.clone());
        }
        let moved = |tensor: Tensor| tensor.to_device(&self.device).unwrap();
        let parameters = decoder.parameters().into_iter().map(|(name, tensor)| (name, moved(tensor))).collect();
        Decoder::trainable(decoder.architecture().clone(), parameters).unwrap().with_precision(decoder.precision())
    }
}

/// The GPU that tests run on, or a skip with its reason.
pub fn board() -> Option<Board> {
    if let Some(name) = gpu() {
        return Some(card(&name));
    }
    if emulator::compiler().is_none() {
        skip(Part::Cxx, "no C++ compiler to run the GPU's kernels with");
        return None;
    }
    Some(Board { backend: Emulator::shared(), device: Device::Cpu })
}

#[cfg(feature = "cuda")]
fn card(name: &str) -> Board {
    card::open(name)
}

#[cfg(not(feature = "cuda"))]
fn card(name: &str) -> Board {
    panic!("REHEARSAL_GPU names {name}, and these tests were built without the feature `cuda`")
}
