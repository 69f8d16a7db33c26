//! AdamW's arithmetic on a GPU: parameter and moments in one kernel launch.

use candle_core::{DType, Result, Tensor, bail};
use rehearsal_kernels::gpu::{Buffer, ElementType, Fields, GpuBackend, KernelArgument, Launch, Source, SourceFile};

use super::moments::Moments;
use super::update::Rule;

/// The kernels of AdamW.
pub static SOURCE: SourceFile = SourceFile::new("adamw", include_str!("adamw.cu"));

/// Threads per block; the kernel for eight-bit moments takes a block of them at a time.
const THREADS: usize = super::moments::QUANTUM;

/// Updates a parameter and its moments in place.
pub fn update(
    backend: &dyn GpuBackend,
    parameter: &Tensor,
    moments: &Moments,
    gradient: &Tensor,
    rule: Rule,
) -> Result<()> {
    if parameter.dtype() != DType::F32 {
        bail!("AdamW on a GPU updates f32 parameters, not {:?}", parameter.dtype());
    }
    let gradient = gradient.to_dtype(DType::F32)?.contiguous()?;
    let Moments { first, second } = moments;
    let kernel = match first.values.dtype() {
        DType::F32 => "adamw_f32",
        DType::BF16 => "adamw_bf16",
        _ => "adamw_int8",
    };
    let mut pointers = vec![backend.tensor(parameter)?];
    for moment in [first, second] {
        pointers.push(backend.tensor(&moment.values)?);
        if let Some(scales) = &moment.scales {
            pointers.push(backend.tensor(scales)?);
        }
    }
    pointers.push(backend.tensor(&gradient)?);
    let n = parameter.elem_count();
    let mut arguments: Vec<&dyn KernelArgument> = pointers.iter().map(|p| p as &dyn KernelArgument).collect();
    let fields = fields(rule);
    arguments.extend([&n as &dyn KernelArgument, &fields]);
    launch(backend, kernel, n.div_ceil(THREADS), &arguments)
}

/// Sums of the squares of f32 tensors, in f64: one for each block of [`super::BLOCK`] elements of each tensor, in order.
pub fn squares(backend: &dyn GpuBackend, tensors: &[Tensor]) -> Result<Vec<f64>> {
    let blocks = |tensor: &Tensor| tensor.elem_count().div_ceil(super::BLOCK);
    let total: usize = tensors.iter().map(blocks).sum();
    let mut sums = Buffer::empty(ElementType::F32);
    // A sum takes the room of two f32.
    sums.resize(backend, 2 * total)?;
    let mut at = 0;
    for tensor in tensors {
        let (x, n, sum) = (backend.tensor(tensor)?, tensor.elem_count(), sums.at(2 * at));
        launch(backend, "squares", blocks(tensor), &[&x, &n, &sum])?;
        at += blocks(tensor);
    }
    let mut found = vec![0f64; total];
    backend.download(sums.pointer(), bytemuck::cast_slice_mut(&mut found))?;
    Ok(found)
}

fn launch(
    backend: &dyn GpuBackend,
    kernel: &'static str,
    blocks: usize,
    arguments: &[&dyn KernelArgument],
) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    backend.launch(&Launch {
        source: Source { file: &SOURCE, element: ElementType::F32, head_dim: 1 },
        kernel,
        grid: (blocks as u32, 1),
        block: (THREADS as u32, 1),
        shared: 0,
        arguments: arguments.iter().map(|a| a.argument()).collect(),
    })
}

/// `Rule` of the kernels.
fn fields(r: Rule) -> Fields {
    let numbers = [r.beta1, r.beta2, r.decay, r.rate, r.root, r.eps, r.scale];
    let fields = numbers.iter().fold(Fields::new(), |fields, &x| fields.float(x as f32));
    r.salts.iter().fold(fields, |fields, &salt| fields.unsigned(salt)).unsigned(r.from)
}
