//! Weights packed for GEMM.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use half::bf16;
use rehearsal_kernels::gemm::{Element, Packed, Precision, View, gemm};

use crate::model::Projection;

/// Runs `f` on CPU matrices of one element type, each contiguous or the transpose of a contiguous one.
pub fn with_views<E: Element + WithDType, T>(
    tensors: &[&Tensor],
    f: impl FnOnce(&[View<'_, E>]) -> Result<T>,
) -> Result<T> {
    let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let views = guards
        .iter()
        .map(|(storage, layout)| {
            let Storage::Cpu(storage) = &**storage else { bail!("a CPU kernel needs a tensor on the CPU") };
            view::<E>(storage, layout)
        })
        .collect::<Result<Vec<_>>>()?;
    f(&views)
}

fn view<'a, E: Element + WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<View<'a, E>> {
    let (rows, columns) = match *layout.dims() {
        [n] => (1, n),
        [rows, columns] => (rows, columns),
        _ => bail!("a weight must have one or two dimensions, not {:?}", layout.dims()),
    };
    let data = storage.as_slice::<E>()?;
    if let Some((from, to)) = layout.contiguous_offsets() {
        return Ok(View::new(&data[from..to], rows, columns));
    }
    // GPT-2 stores its matrices as `[inputs, outputs]`.
    if layout.stride() == [1, rows] {
        let from = layout.start_offset();
        return Ok(View::new(&data[from..from + rows * columns], columns, rows).t());
    }
    bail!("a weight must be contiguous or the transpose of a contiguous one, not of strides {:?}", layout.stride())
}

/// Packs matrices side by side into `packed`, each transposed if `transposed`.
pub fn pack_into(packed: &mut Packed, tensors: &[&Tensor], transposed: bool) -> Result<()> {
    fn typed<E: Element + WithDType>(packed: &mut Packed, tensors: &[&Tensor], transposed: bool) -> Result<()> {
        with_views::<E, _>(tensors, |views| {
            let views: Vec<_> = views.iter().map(|v| if transposed { v.t() } else { *v }).collect();
            packed.fill(&views, true);
            Ok(())
        })
    }
    match tensors.first().map(|t| t.dtype()) {
        Some(DType::BF16) => typed::<bf16>(packed, tensors, transposed),
        _ => typed::<f32>(packed, tensors, transposed),
    }
}

/// Elements of a vector in f32.
pub fn as_floats(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.to_vec1()
}

/// Weights of projections of one input, packed side by side so that they are one product.
pub struct PackedProjection {
    weight: Packed,
    bias: Option<Vec<f32>>,
}

impl PackedProjection {
    /// An empty projection, to be [filled](Self::fill).
    pub fn empty(precision: Precision) -> Self {
        Self { weight: Packed::empty(precision), bias: None }
    }

    /// Replaces the contents by the current weights of `parts`.
    pub fn fill(&mut self, parts: &[&Projection]) -> Result<()> {
        let weights: Vec<&Tensor> = parts.iter().map(|p| &p.weight).collect();
        pack_into(&mut self.weight, &weights, true)?;
        let mut bias = Vec::new();
        for part in parts {
            match &part.bias {
                Some(b) => bias.extend(as_floats(b)?),
                None => bias.resize(bias.len() + part.weight.dim(0)?, 0.0),
            }
        }
        self.bias = parts.iter().any(|p| p.bias.is_some()).then_some(bias);
        Ok(())
    }

    /// `out = x · Wᵀ + b`.
    pub fn apply(&self, x: &[f32], out: &mut Vec<f32>) {
        let rows = x.len() / self.weight.depth();
        out.resize(rows * self.weight.cols(), 0.0);
        gemm(View::new(x, rows, self.weight.depth()), &self.weight, out, false);
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len()) {
                for (x, b) in row.iter_mut().zip(bias) {
                    *x += b;
                }
            }
        }
    }
}
