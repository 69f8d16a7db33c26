//! The GPU backend: memory, kernel launches and matrix products on a device.
//!
//! [`GpuBackend`] is what a device provides. With the feature `cuda` there is an implementation for CUDA; the tests
//! have another that compiles the kernels' sources as C++ and runs them on the CPU, and compare whole models on it with
//! the CPU kernels.
//!
//! Every kernel's source is a [`SourceFile`], compiled by the backend when it is first launched. Buffers hold f32 or, in
//! bfloat16 precision, bfloat16 wherever a product reads or writes them. Sums are f32 and taken in a fixed order, so a
//! launch gives the same bits each time it runs on the same device; unlike on the CPU they may depend on the batch.

mod arguments;
mod backend;
mod buffer;
#[cfg(feature = "cuda")]
mod cuda;
mod launcher;
mod source;
mod tables;
mod tiles;

use std::sync::Arc;

use candle_core::{Device, Result};

pub use arguments::{Fields, KernelArgument};
pub use backend::{Argument, DeviceMemory, Factor, Gemm, GpuBackend, Launch, LaunchGraph};
pub use buffer::Buffer;
#[cfg(feature = "cuda")]
pub use cuda::CudaBackend;
pub use launcher::Launcher;
pub use source::{ATTENTION, DECODE, ElementType, FILES, HEAD, ROWS, SAMPLE, Source, SourceFile};
pub use tables::{Context, Table};
pub use tiles::{AttentionShared, KEY_TILE, Layout, QUERY_TILE, by_target};

/// The backend of a candle device, or `None` if the device is not a GPU that this build supports.
#[cfg(feature = "cuda")]
pub fn for_device(device: &Device) -> Result<Option<Arc<dyn GpuBackend>>> {
    match device {
        Device::Cuda(device) => Ok(Some(CudaBackend::shared(device)?)),
        _ => Ok(None),
    }
}

/// The backend of a candle device: always `None`, as this build has no GPU support (feature `cuda`).
#[cfg(not(feature = "cuda"))]
pub fn for_device(_: &Device) -> Result<Option<Arc<dyn GpuBackend>>> {
    Ok(None)
}
