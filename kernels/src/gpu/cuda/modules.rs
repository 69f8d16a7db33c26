//! Kernels of a CUDA device: NVRTC compiles a source when one of its kernels is first launched.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule, sys};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::{Result, bail};

use crate::gpu::backend::Launch;
use crate::gpu::source::Source;

/// Bytes of dynamic shared memory that a kernel may use without setting its attribute.
const SHARED_DEFAULT: u32 = 48 << 10;

/// The compiled sources of a device, and the kernels that were launched.
#[derive(Default)]
pub struct Modules {
    modules: Mutex<HashMap<Source, Arc<CudaModule>>>,
    functions: Mutex<HashMap<(Source, &'static str), Kernel>>,
}

#[derive(Clone)]
struct Kernel {
    function: CudaFunction,
    /// Bytes of dynamic shared memory that it may use.
    shared: u32,
}

impl Modules {
    /// The kernel of a launch, allowed to use the launch's shared memory.
    pub fn function(&self, context: &Arc<CudaContext>, launch: &Launch) -> Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (launch.source, launch.kernel);
        let mut kernel = match functions.get(&key) {
            Some(kernel) if launch.shared <= kernel.shared => return Ok(kernel.function.clone()),
            Some(kernel) => kernel.clone(),
            None => {
                let function = self.module(context, launch.source)?.load_function(launch.kernel).w()?;
                Kernel { function, shared: SHARED_DEFAULT }
            }
        };
        if launch.shared > kernel.shared {
            let limit =
                context.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
            let limit = limit.w()? as u32;
            if launch.shared > limit {
                bail!(
                    "GPU kernel `{}` for heads of width {} needs {} bytes of shared memory a block, and this GPU has {limit}",
                    launch.kernel,
                    launch.source.head_dim,
                    launch.shared,
                );
            }
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.function.set_attribute(attribute, launch.shared as i32).w()?;
            kernel.shared = launch.shared;
        }
        functions.insert(key, kernel.clone());
        Ok(kernel.function)
    }

    fn module(&self, context: &Arc<CudaContext>, source: Source) -> Result<Arc<CudaModule>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&source) {
            return Ok(module.clone());
        }
        let (major, minor) = context.compute_capability().w()?;
        let options = CompileOptions {
            options: source.options(&format!("compute_{}", 10 * major + minor)),
            name: Some(format!("{}.cu", source.file.name)),
            ..Default::default()
        };
        let ptx = compile_ptx_with_opts(source.text(), options);
        let ptx = ptx
            .map_err(|e| candle_core::Error::Msg(format!("GPU kernels `{}` do not compile: {e}", source.file.name)))?;
        let module = context.load_module(ptx).w()?;
        modules.insert(source, module.clone());
        Ok(module)
    }
}
