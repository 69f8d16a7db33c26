//! The backend of a CUDA device: NVRTC compiles kernels when they are first launched, cuBLAS computes products.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result::gemm_ex, sys as blas};
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaModule, CudaStream, DevicePtr, result, sys};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor, bail};

use super::backend::{DeviceMemory, Factor, Gemm, GpuBackend, Launch, LaunchGraph};
use super::source::{ElementType, Source};

/// Bytes of cuBLAS's workspace, which is allocated beforehand: no memory may be allocated while launches are captured.
const WORKSPACE: usize = 32 << 20;

/// Bytes of dynamic shared memory that a kernel may use without setting its attribute.
const SHARED_DEFAULT: u32 = 48 << 10;

/// A CUDA device, whose tensors are used on one stream.
pub struct CudaBackend {
    stream: Arc<CudaStream>,
    /// Created by the first product.
    blas: OnceLock<Blas>,
    modules: Mutex<HashMap<Source, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(Source, &'static str), CudaFunction>>,
}

/// cuBLAS with its workspace.
struct Blas {
    handle: CudaBlas,
    _workspace: Allocated,
}

impl Blas {
    fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let handle = CudaBlas::new(stream.clone()).w()?;
        let workspace = Allocated::new(stream, WORKSPACE)?;
        // SAFETY: the workspace lives as long as the handle.
        unsafe { blas::cublasSetWorkspace_v2(*handle.handle(), workspace.pointer as *mut c_void, WORKSPACE) }
            .result()
            .w()?;
        Ok(Self { handle, _workspace: workspace })
    }
}

/// Memory that is freed in stream order.
struct Allocated {
    pointer: u64,
    stream: Arc<CudaStream>,
}

impl Allocated {
    fn new(stream: &Arc<CudaStream>, bytes: usize) -> Result<Self> {
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

impl CudaBackend {
    /// The backend of candle's device.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        Ok(Self { stream, blas: OnceLock::new(), modules: Mutex::default(), functions: Mutex::default() })
    }

    fn blas(&self) -> Result<&Blas> {
        if let Some(blas) = self.blas.get() {
            return Ok(blas);
        }
        let blas = Blas::new(&self.stream)?;
        Ok(self.blas.get_or_init(|| blas))
    }

    fn module(&self, source: Source) -> Result<Arc<CudaModule>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&source) {
            return Ok(module.clone());
        }
        let (major, minor) = self.stream.context().compute_capability().w()?;
        let options = CompileOptions {
            options: source.options(&format!("compute_{}", 10 * major + minor)),
            name: Some(format!("{}.cu", source.file.name)),
            ..Default::default()
        };
        let ptx = compile_ptx_with_opts(source.text(), options);
        let ptx = ptx
            .map_err(|e| candle_core::Error::Msg(format!("GPU kernels `{}` do not compile: {e}", source.file.name)))?;
        let module = self.stream.context().load_module(ptx).w()?;
        modules.insert(source, module.clone());
        Ok(module)
    }

    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (launch.source, launch.kernel);
        let function = match functions.get(&key) {
            Some(function) => function.clone(),
            None => {
                let function = self.module(launch.source)?.load_function(launch.kernel).w()?;
                functions.insert(key, function.clone());
                function
            }
        };
        if launch.shared > SHARED_DEFAULT {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, launch.shared as i32).w()?;
        }
        Ok(function)
    }
}

fn data_type(element: ElementType) -> blas::cudaDataType {
    match element {
        ElementType::F32 => blas::cudaDataType::CUDA_R_32F,
        ElementType::Bf16 => blas::cudaDataType::CUDA_R_16BF,
    }
}

/// cuBLAS is column-major: a row-major matrix is read as its transpose.
fn operation(factor: &Factor) -> blas::cublasOperation_t {
    match factor.transposed {
        false => blas::cublasOperation_t::CUBLAS_OP_N,
        true => blas::cublasOperation_t::CUBLAS_OP_T,
    }
}

impl GpuBackend for CudaBackend {
    fn allocate(&self, bytes: usize) -> Result<DeviceMemory> {
        let memory = Allocated::new(&self.stream, bytes.max(1))?;
        Ok(DeviceMemory { pointer: memory.pointer, bytes, owner: Box::new(memory) })
    }

    fn zero(&self, pointer: u64, bytes: usize) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: the caller's memory has `bytes` bytes.
        unsafe { result::memset_d8_async(pointer, 0, bytes, self.stream.cu_stream()) }.w()
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: both have `bytes` bytes.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }.w()
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) }.w()
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        // SAFETY: `from` has as many bytes as `to`, and the stream is synchronised before `to` is read.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.w()?;
        self.stream.synchronize().w()
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        let function = self.function(launch)?;
        self.stream.context().bind_to_thread().w()?;
        let mut parameters: Vec<*mut c_void> = launch.arguments.iter().map(|a| a.0.as_ptr() as *mut c_void).collect();
        let (grid, block) = ((launch.grid.0, launch.grid.1, 1), (launch.block.0, launch.block.1, 1));
        // SAFETY: the arguments are the kernel's, in size and order; tests compare every launch with its kernel.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                grid,
                block,
                launch.shared,
                self.stream.cu_stream(),
                &mut parameters,
            )
        }
        .w()
    }

    fn gemm(&self, p: &Gemm) -> Result<()> {
        let blas = self.blas()?;
        self.stream.context().bind_to_thread().w()?;
        let (alpha, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        // Cᵀ = Bᵀ Aᵀ.
        // SAFETY: the pointers are this device's, and the strides say how far they are read and written.
        unsafe {
            gemm_ex(
                *blas.handle.handle(),
                operation(&p.b),
                operation(&p.a),
                p.columns as i32,
                p.rows as i32,
                p.depth as i32,
                (&raw const alpha).cast(),
                p.b.pointer as *const c_void,
                data_type(p.element),
                p.b.stride as i32,
                p.a.pointer as *const c_void,
                data_type(p.element),
                p.a.stride as i32,
                (&raw const beta).cast(),
                p.c as *mut c_void,
                data_type(p.c_element),
                p.c_stride as i32,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .w()
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

    fn capture(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn LaunchGraph>> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        let captured = f();
        // The capture is ended even if `f` failed.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).w()?;
        captured?;
        match graph {
            Some(graph) => Ok(Box::new(Graph(graph))),
            None => bail!("no GPU operation was captured"),
        }
    }
}

struct Graph(candle_core::cuda_backend::cudarc::driver::CudaGraph);

// SAFETY: a graph is launched by its owner only, one launch at a time.
unsafe impl Send for Graph {}

impl LaunchGraph for Graph {
    fn replay(&self) -> Result<()> {
        self.0.launch().w()
    }
}
