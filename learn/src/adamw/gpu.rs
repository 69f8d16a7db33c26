//! AdamW's kernels on a CUDA device.

use candle_core::cuda_backend::cudarc::driver::{CudaView, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaStorage, WrapErr};
use candle_core::{CudaDevice, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use std::sync::OnceLock;

use super::moments::Moments;
use super::update::Rule;

const THREADS: u32 = 256;

/// The kernels' code for the first device that asks; every device of a machine that this serves is of one kind.
fn code(device: &CudaDevice) -> Result<&'static str> {
    static CODE: OnceLock<std::result::Result<String, String>> = OnceLock::new();
    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    let compile = || {
        let options = CompileOptions {
            options: vec![format!("--gpu-architecture=compute_{}", 10 * major + minor), "--std=c++17".into()],
            name: Some("adamw.cu".into()),
            ..Default::default()
        };
        compile_ptx_with_opts(super::ADAMW_CUDA, options).map(|p| p.to_src()).map_err(|e| e.to_string())
    };
    CODE.get_or_init(compile).as_deref().map_err(|e| candle_core::Error::Msg(format!("AdamW does not compile: {e}")))
}

/// Where a tensor begins on its device.
fn pointer(tensor: &Tensor, device: &CudaDevice) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("an optimiser's tensor is on another device") };
    begin(storage, layout, device)
}

fn begin(storage: &CudaStorage, layout: &Layout, device: &CudaDevice) -> Result<u64> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("an optimiser's tensor must be contiguous") };
    fn at<T>(view: CudaView<'_, T>, device: &CudaDevice) -> u64 {
        view.device_ptr(&device.cuda_stream()).0
    }
    Ok(match candle_core::backend::BackendStorage::dtype(storage) {
        DType::F32 => at(storage.as_cuda_slice::<f32>()?.slice(from..to), device),
        DType::BF16 => at(storage.as_cuda_slice::<half::bf16>()?.slice(from..to), device),
        DType::U8 => at(storage.as_cuda_slice::<u8>()?.slice(from..to), device),
        other => bail!("an optimiser on a GPU works on f32, bf16 and u8, not {other:?}"),
    })
}

/// Updates a parameter and its moments in place.
pub fn update(parameter: &Tensor, moments: &Moments, gradient: &Tensor, rule: Rule) -> Result<()> {
    parameter.inplace_op1(&Step { moments, gradient, rule })
}

struct Step<'a> {
    moments: &'a Moments,
    gradient: &'a Tensor,
    rule: Rule,
}

impl InplaceOp1 for Step<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> Result<()> {
        bail!("this step is a GPU's")
    }

    fn cuda_fwd(&self, parameter: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let device = parameter.device.clone();
        let p = begin(parameter, layout, &device)?;
        let Moments { first, second } = self.moments;
        let (m, v) = (pointer(&first.values, &device)?, pointer(&second.values, &device)?);
        let g = pointer(&self.gradient.to_dtype(DType::F32)?.contiguous()?, &device)?;
        let n = layout.shape().elem_count();
        let kernel = match first.values.dtype() {
            DType::F32 => "adamw_f32",
            DType::BF16 => "adamw_bf16",
            _ => "adamw_int8",
        };
        let function = device.get_or_load_custom_func(kernel, "rehearsal_adamw", code(&device)?)?;
        let scales = match (&first.scales, &second.scales) {
            (Some(first), Some(second)) => Some((pointer(first, &device)?, pointer(second, &device)?)),
            _ => None,
        };
        let mut launch = function.builder();
        launch.arg(&p).arg(&m);
        if let Some((m_scales, _)) = &scales {
            launch.arg(m_scales);
        }
        launch.arg(&v);
        if let Some((_, v_scales)) = &scales {
            launch.arg(v_scales);
        }
        let r = self.rule;
        let numbers = Numbers {
            floats: [r.beta1, r.beta2, r.decay, r.rate, r.root, r.eps, r.scale].map(|x| x as f32),
            salts: r.salts,
        };
        launch.arg(&g).arg(&n).arg(&numbers);
        let grid = (n.div_ceil(THREADS as usize) as u32, 1, 1);
        let config = LaunchConfig { grid_dim: grid, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's, in size and order; every tensor has `n` elements.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }
}

/// `Rule` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
struct Numbers {
    floats: [f32; 7],
    salts: [u32; 2],
}

// SAFETY: plain numbers, laid out as the kernel's structure.
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for Numbers {}
