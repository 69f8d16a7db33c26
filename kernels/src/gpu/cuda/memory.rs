//! Memory of a CUDA device.

use std::sync::Arc;

use candle_core::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, result};

/// Memory that is allocated and freed in the order of a stream.
pub struct Allocated {
    /// Address on the device.
    pub pointer: u64,
    stream: Arc<CudaStream>,
}

impl Allocated {
    pub fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
        stream.context().bind_to_thread().w()?;
        // SAFETY: the stream is alive; the memory is freed once, by `drop`.
        let pointer = unsafe { result::malloc_async(stream.cu_stream(), bytes) }.w()?;
        Ok(Self { pointer, stream: stream.clone() })
    }
}

impl Drop for Allocated {
    fn drop(&mut self) {
        if self.stream.context().bind_to_thread().is_ok() {
            // SAFETY: allocated on this stream and not used by anything asked for later. A failure leaves the memory to the
            // end of the process.
            let _ = unsafe { result::free_async(self.pointer, self.stream.cu_stream()) };
        }
    }
}
