//! Differentiable operations on candle tensors: each has a fused CPU kernel with its own backward and a plain
//! candle twin. The twin is the oracle in tests and the path for devices and types that have no kernel.

mod attention;
mod head;
mod linear;
mod norm;
mod rope;
mod swiglu;

pub use attention::{AttentionShape, attend_tail, attention};
pub use head::head_logprobs;
pub use linear::linear;
pub use norm::rms_norm;
pub use rope::{Positions, rope};
pub use swiglu::swiglu;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Which implementation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// The fused kernel where there is one for the device and type, else the twin.
    #[default]
    Fused,
    /// Always the plain candle twin.
    Plain,
}

impl Kernels {
    fn fused(self, x: &Tensor) -> bool {
        self == Kernels::Fused && x.device().is_cpu() && x.dtype() == DType::F32
    }
}

/// The elements of a contiguous f32 operand.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((from, to))) => Ok(&data[from..to]),
        (CpuStorage::F32(_), None) => bail!("{what} must be contiguous"),
        _ => bail!("{what} must be f32"),
    }
}

/// Runs `f` on the elements of contiguous f32 CPU tensors.
pub(crate) fn with_floats<const N: usize, T>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<T>,
) -> Result<T> {
    let guards = tensors.map(|t| t.storage_and_layout());
    let mut slices = [&[] as &[f32]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        match &**storage {
            Storage::Cpu(cpu) => *slice = floats(cpu, layout, "an operand")?,
            _ => bail!("a CPU kernel was given a tensor of another device"),
        }
    }
    f(slices)
}

#[cfg(test)]
pub(crate) mod twin {
    //! Compares a fused operation with its twin: values and gradients.

    use candle_core::{Device, Result, Tensor, Var};

    use super::Kernels;
    use crate::random::Stream;

    pub fn random(shape: &[usize], id: u64) -> Var {
        let stream = Stream::new(11, id);
        let n: usize = shape.iter().product();
        let data: Vec<f32> = (0..n as u64).map(|i| stream.normal(i) as f32).collect();
        Var::from_vec(data, shape, &Device::Cpu).unwrap()
    }

    fn run(f: &dyn Fn(&[Tensor], Kernels) -> Result<Tensor>, inputs: &[Var], kernels: Kernels) -> Vec<Vec<f32>> {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&tensors, kernels).unwrap();
        let weight = random(out.dims(), 99);
        let grads = (&out * weight.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        std::iter::once(flat(&out)).chain(inputs.iter().map(|v| flat(grads.get(v).expect("a gradient")))).collect()
    }

    pub fn check(f: impl Fn(&[Tensor], Kernels) -> Result<Tensor>, inputs: &[Var]) {
        let (fused, plain) = (run(&f, inputs, Kernels::Fused), run(&f, inputs, Kernels::Plain));
        for (which, (fused, plain)) in fused.iter().zip(&plain).enumerate() {
            let size = plain.iter().fold(1.0f32, |m, x| m.max(x.abs()));
            for (i, (a, b)) in fused.iter().zip(plain).enumerate() {
                assert!((a - b).abs() <= 2e-5 * size, "output {which}, element {i}: fused {a}, plain {b}");
            }
        }
    }
}
