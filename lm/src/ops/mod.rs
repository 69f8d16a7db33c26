//! Differentiable operations as plain candle graphs: the reference for tests of the kernels, and the fallback for
//! devices and types that have none.

mod activation;
mod attention;
mod head;
mod linear;
mod norm;
mod rope;

pub use activation::{geglu, swiglu};
pub use attention::{AttentionShape, attend_tail, attention};
pub use head::{logprobs, softcap};
pub use linear::linear;
pub use norm::{layer_norm, rms_norm};
pub use rope::{Positions, rope};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Storage, Tensor, bail};

/// Implementation of a decoder's operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// Fused kernels where the device and type have them, else candle graphs.
    #[default]
    Fused,
    /// Always plain candle graphs.
    Plain,
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor.
pub(crate) fn with_floats<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(data)), Some((from, to))) => f(&data[from..to]),
        _ => bail!(
            "a CPU kernel needs a contiguous f32 tensor on the CPU, not {:?} on {:?}",
            tensor.dtype(),
            tensor.device().location()
        ),
    }
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor, which it may change in place.
pub(crate) fn with_floats_mut<T>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<T>) -> Result<T> {
    let op = InPlace { f: Some(f).into(), result: None.into() };
    tensor.inplace_op1(&op)?;
    op.result.take().ok_or_else(|| candle_core::Error::Msg("an in-place operation did not run".into()))
}

struct InPlace<F, T> {
    f: std::cell::Cell<Option<F>>,
    result: std::cell::Cell<Option<T>>,
}

impl<T, F: FnOnce(&mut [f32]) -> Result<T>> InplaceOp1 for InPlace<F, T> {
    fn name(&self) -> &'static str {
        "in_place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.f.take()) {
            (CpuStorage::F32(data), Some((from, to)), Some(f)) => {
                self.result.set(Some(f(&mut data[from..to])?));
                Ok(())
            }
            _ => bail!("an in-place operation needs a contiguous f32 tensor on the CPU"),
        }
    }
}

#[cfg(test)]
pub(crate) mod twin {
    //! Values and gradients of candle graphs, which tests compare kernels with.

    use candle_core::{Device, Result, Tensor, Var};

    use rehearsal_kernels::random::Stream;

    pub fn random(shape: &[usize], id: u64) -> Var {
        let stream = Stream::new(11, id);
        let n: usize = shape.iter().product();
        let data: Vec<f32> = (0..n as u64).map(|i| stream.normal(i) as f32).collect();
        Var::from_vec(data, shape, &Device::Cpu).unwrap()
    }

    pub fn floats(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    pub struct Plain {
        pub output: Vec<f32>,
        /// Gradient with respect to the output.
        pub upstream: Vec<f32>,
        pub gradients: Vec<Vec<f32>>,
    }

    pub fn plain(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Var]) -> Plain {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&tensors).unwrap();
        let upstream = random(out.dims(), 99);
        let grads = (&out * upstream.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let gradients = inputs.iter().map(|v| floats(grads.get(v).expect("a gradient"))).collect();
        Plain { output: floats(&out), upstream: floats(&upstream), gradients }
    }

    #[track_caller]
    pub fn close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        let size = want.iter().fold(1.0f32, |m, x| m.max(x.abs()));
        for (i, (a, b)) in got.iter().zip(want).enumerate() {
            assert!((a - b).abs() <= 2e-5 * size, "element {i}: kernel {a}, graph {b}");
        }
    }
}
