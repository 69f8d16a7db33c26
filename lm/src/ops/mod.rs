//! Differentiable operations as plain candle graphs: what runs on devices and types without kernels of ours, and the
//! oracle for the kernels on the CPU.

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

/// Which implementation of the decoder runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// Ours where there is one for the device and type, else the graph.
    #[default]
    Fused,
    /// Always the plain candle graph.
    Plain,
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor.
pub(crate) fn with_floats<T>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(data)), Some((from, to))) => f(&data[from..to]),
        _ => bail!("a CPU kernel wants contiguous f32 tensors on the CPU"),
    }
}

/// Runs `f` on the elements of a contiguous f32 CPU tensor, to change them in place.
pub(crate) fn with_floats_mut<T>(tensor: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<T>) -> Result<T> {
    let change = Change { f: Some(f).into(), result: None.into() };
    tensor.inplace_op1(&change)?;
    change.result.take().ok_or_else(|| candle_core::Error::Msg("an in-place change did not run".into()))
}

struct Change<F, T> {
    f: std::cell::Cell<Option<F>>,
    result: std::cell::Cell<Option<T>>,
}

impl<T, F: FnOnce(&mut [f32]) -> Result<T>> InplaceOp1 for Change<F, T> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match (storage, layout.contiguous_offsets(), self.f.take()) {
            (CpuStorage::F32(data), Some((from, to)), Some(f)) => {
                self.result.set(Some(f(&mut data[from..to])?));
                Ok(())
            }
            _ => bail!("an in-place change wants a contiguous f32 tensor"),
        }
    }
}

#[cfg(test)]
pub(crate) mod twin {
    //! What the graph says: values and gradients, for kernels to be compared with.

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
        /// Gradient that was sent back.
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
