//! AdamW's arithmetic on a GPU: parameter and moments in one kernel launch.

use candle_core::{DType, Result, Tensor, bail};
use rehearsal_kernels::gpu::{ElementType, Fields, GpuBackend, KernelArgument, Launch, Source, SourceFile};

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
    let mut arguments: Vec<_> = pointers.iter().map(KernelArgument::argument).collect();
    arguments.extend([n.argument(), fields(rule).argument()]);
    backend.launch(&Launch {
        source: Source { file: &SOURCE, element: ElementType::F32, head_dim: 1 },
        kernel,
        grid: (n.div_ceil(THREADS) as u32, 1),
        block: (THREADS as u32, 1),
        shared: 0,
        arguments,
    })
}

/// `Rule` of the kernels.
fn fields(r: Rule) -> Fields {
    let numbers = [r.beta1, r.beta2, r.decay, r.rate, r.root, r.eps, r.scale];
    let fields = numbers.iter().fold(Fields::new(), |fields, &x| fields.float(x as f32));
    r.salts.iter().fold(fields, |fields, &salt| fields.unsigned(salt)).unsigned(r.from)
}
