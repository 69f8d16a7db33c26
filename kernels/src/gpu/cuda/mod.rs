//! The backend of a CUDA device: NVRTC compiles kernels when they are first launched, cuBLAS computes products.

mod graph;
mod memory;
mod modules;
mod products;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, result};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor, bail};

use self::graph::Captures;
use self::memory::Allocated;
use self::modules::Modules;
use self::products::{Blas, RowProducts};
use super::backend::{DeviceMemory, Gemm, GpuBackend, Launch, LaunchGraph};

/// A CUDA device, whose tensors are used on one stream.
pub struct CudaBackend {
    stream: Arc<CudaStream>,
    captures: Captures,
    /// cuBLAS on the stream, and on that of captures; each is created by its first product.
    blas: OnceLock<Blas>,
    captured_blas: OnceLock<Blas>,
    products: RowProducts,
    modules: Modules,
    /// Whether every launch is waited for, so that a kernel that fails is the one that is named.
    waits: bool,
}

/// The environment variable that makes every launch be waited for.
const WAITS: &str = "REHEARSAL_GPU_WAIT";

impl CudaBackend {
    /// The backend of candle's device. All models on a device share it, with its compiled kernels.
    pub fn shared(device: &CudaDevice) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<(DeviceId, Weak<CudaBackend>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, backend)| backend.strong_count() > 0);
        if let Some(backend) = open.iter().find(|(id, _)| *id == device.id()).and_then(|(_, b)| b.upgrade()) {
            return Ok(backend);
        }
        let backend = Arc::new(Self::new(device)?);
        open.push((device.id(), Arc::downgrade(&backend)));
        Ok(backend)
    }

    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        Ok(Self {
            captures: Captures::new(&stream)?,
            stream,
            blas: OnceLock::new(),
            captured_blas: OnceLock::new(),
            products: RowProducts::new(),
            modules: Modules::default(),
            waits: std::env::var_os(WAITS).is_some_and(|value| value != "0"),
        })
    }

    /// Binds the device to this thread; the stream for what the thread asks for.
    fn bound(&self) -> Result<&Arc<CudaStream>> {
        self.stream.context().bind_to_thread().w()?;
        Ok(self.captures.stream().unwrap_or(&self.stream))
    }

    /// The device's stream, for an operation that cannot be captured.
    fn uncaptured(&self, what: &str) -> Result<&Arc<CudaStream>> {
        if self.captures.stream().is_some() {
            bail!("{what} cannot be captured");
        }
        self.bound()
    }

    /// cuBLAS for what this thread asks for.
    fn blas(&self) -> Result<&Blas> {
        let blas = if self.captures.stream().is_some() { &self.captured_blas } else { &self.blas };
        if let Some(blas) = blas.get() {
            return Ok(blas);
        }
        let made = Blas::new(self.uncaptured("opening cuBLAS")?)?;
        Ok(blas.get_or_init(|| made))
    }
}

impl GpuBackend for CudaBackend {
    fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        let memory = Allocated::new(self.uncaptured("an allocation")?, bytes.max(1))?;
        Ok(DeviceMemory { pointer: memory.pointer, bytes, owner: Box::new(memory) })
    }

    fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        let stream = self.bound()?;
        // SAFETY: the caller's memory has `bytes` bytes.
        unsafe { result::memset_d8_async(pointer, 0, bytes, stream.cu_stream()) }.w()
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let stream = self.bound()?;
        // SAFETY: both have `bytes` bytes.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.w()
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        let stream = self.uncaptured("an upload")?;
        // SAFETY: pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(to, from, stream.cu_stream()) }.w()
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let stream = self.uncaptured("a download")?;
        // SAFETY: `from` has as many bytes as `to`, and the stream is synchronised before `to` is read.
        unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) }.w()?;
        stream.synchronize().w()
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let stream = self.bound()?;
        let function = self.modules.function(stream.context(), launch)?;
        let mut parameters: Vec<*mut c_void> = launch.arguments.iter().map(|a| a.0.as_ptr() as *mut c_void).collect();
        let (grid, block) = ((launch.grid.0, launch.grid.1, 1), (launch.block.0, launch.block.1, 1));
        // SAFETY: the arguments are the kernel's, in size and order; tests compare every launch with its kernel.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                grid,
                block,
                launch.shared,
                stream.cu_stream(),
                &mut parameters,
            )
        };
        let done = match launched {
            Ok(()) if self.waits && self.captures.stream().is_none() => stream.synchronize(),
            launched => launched,
        };
        done.map_err(|e| {
            let Launch { source, kernel, grid, block, shared, .. } = launch;
            candle_core::Error::Msg(format!(
                "GPU kernel `{kernel}` ({:?}, heads of width {}, grid {grid:?}, block {block:?}, {shared} bytes shared): {e}",
                source.element, source.head_dim
            ))
        })
    }

    fn gemm(&self, p: &Gemm) -> Result<()> {
        let stream = self.bound()?;
        let captured = self.captures.stream().is_some();
        if !p.a.transposed && self.products.gemm(stream, p, captured)? {
            return Ok(());
        }
        self.blas()?.gemm(p)
    }

    fn tensor(&self, tensor: &Tensor) -> Result<u64> {
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("a GPU was given a tensor of another device") };
        let Some((from, _)) = layout.contiguous_offsets() else {
            bail!("a GPU was given a tensor that is not contiguous")
        };
        let start = |storage: &CudaStorage| -> Result<u64> {
            Ok(match candle_core::backend::BackendStorage::dtype(storage) {
                DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&self.stream).0,
                DType::BF16 => storage.as_cuda_slice::<half::bf16>()?.device_ptr(&self.stream).0,
                DType::U8 => storage.as_cuda_slice::<u8>()?.device_ptr(&self.stream).0,
                other => bail!("GPU kernels work on f32, bf16 and u8 tensors, not {other:?}"),
            })
        };
        Ok(start(storage)? + (from * tensor.dtype().size_in_bytes()) as u64)
    }

    fn synchronize(&self) -> Result<()> {
        self.uncaptured("a wait")?.synchronize().w()
    }

    fn capture(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn LaunchGraph>> {
        // Its memory cannot be allocated during the capture.
        if self.captured_blas.get().is_none() {
            let made = Blas::new(self.captures.own_stream())?;
            self.captures.own_stream().synchronize().w()?;
            self.captured_blas.get_or_init(|| made);
        }
        self.captures.capture(&self.stream, f)
    }

    fn survey(&self, p: &Gemm) -> Result<Vec<(f64, bool)>> {
        let stream = self.uncaptured("a survey")?;
        self.products.survey(stream, p, |run| {
            for _ in 0..3 {
                run()?;
            }
            stream.synchronize().w()?;
            let start = std::time::Instant::now();
            for _ in 0..20 {
                run()?;
            }
            stream.synchronize().w()?;
            Ok(start.elapsed().as_secs_f64() * 1e3 / 20.0)
        })
    }
}
