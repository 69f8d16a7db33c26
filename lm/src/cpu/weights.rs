//! Weights in the layout of the products.

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, WithDType, bail};
use half::bf16;

use crate::kernels::gemm::{Element, Packed, Precision, View, gemm};
use crate::model::{Block, Decoder, Projection};

/// Runs `f` on contiguous CPU matrices of one element type.
pub fn with_views<E: Element + WithDType, T>(
    tensors: &[&Tensor],
    f: impl FnOnce(&[View<'_, E>]) -> Result<T>,
) -> Result<T> {
    let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
    let views = guards
        .iter()
        .map(|(storage, layout)| {
            let Storage::Cpu(storage) = &**storage else { bail!("a CPU kernel was given a tensor of another device") };
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
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(View::new(&storage.as_slice::<E>()?[from..to], rows, columns)),
        None => bail!("a weight must be contiguous"),
    }
}

/// Packs matrices side by side, as they are or each transposed.
pub fn pack(tensors: &[&Tensor], transposed: bool, precision: Precision) -> Result<Packed> {
    fn typed<E: Element + WithDType>(tensors: &[&Tensor], transposed: bool, precision: Precision) -> Result<Packed> {
        with_views::<E, _>(tensors, |views| {
            let turned: Vec<_> = views.iter().map(|v| if transposed { v.t() } else { *v }).collect();
            Ok(Packed::concat(&turned, precision))
        })
    }
    match tensors.first().map(|t| t.dtype()) {
        Some(DType::BF16) => typed::<bf16>(tensors, transposed, precision),
        _ => typed::<f32>(tensors, transposed, precision),
    }
}

/// A vector's elements.
pub fn vector(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.to_vec1()
}

/// Projections of one input side by side, as one product.
pub struct PackedProjection {
    weight: Packed,
    bias: Option<Vec<f32>>,
}

impl PackedProjection {
    fn new(parts: &[&Projection], precision: Precision) -> Result<Self> {
        let weights: Vec<&Tensor> = parts.iter().map(|p| &p.weight).collect();
        let mut bias = Vec::new();
        for part in parts {
            match &part.bias {
                Some(b) => bias.extend(vector(b)?),
                None => bias.resize(bias.len() + part.weight.dim(0)?, 0.0),
            }
        }
        let any = parts.iter().any(|p| p.bias.is_some());
        Ok(Self { weight: pack(&weights, true, precision)?, bias: any.then_some(bias) })
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

    /// Columns of the result.
    pub fn width(&self) -> usize {
        self.weight.cols()
    }
}

/// One block's weights.
pub struct PackedBlock {
    pub input_norm: Vec<f32>,
    pub qkv: PackedProjection,
    pub o: PackedProjection,
    pub post_norm: Vec<f32>,
    pub gate_up: PackedProjection,
    pub down: PackedProjection,
}

impl PackedBlock {
    /// Packs a block's weights as they are now.
    pub fn new(b: &Block, precision: Precision) -> Result<Self> {
        Ok(Self {
            input_norm: vector(&b.input_norm)?,
            qkv: PackedProjection::new(&[&b.q, &b.k, &b.v], precision)?,
            o: PackedProjection::new(&[&b.o], precision)?,
            post_norm: vector(&b.post_norm)?,
            gate_up: PackedProjection::new(&[&b.gate, &b.up], precision)?,
            down: PackedProjection::new(&[&b.down], precision)?,
        })
    }
}

/// All weights of a decoder, for generation.
pub struct PackedWeights {
    pub blocks: Vec<PackedBlock>,
    pub norm: Vec<f32>,
    pub head: Packed,
}

impl PackedWeights {
    /// Packs a decoder's weights as they are now.
    pub fn new(decoder: &Decoder) -> Result<Self> {
        let (layers, precision) = (decoder.layers(), decoder.precision());
        Ok(Self {
            blocks: layers.blocks.iter().map(|b| PackedBlock::new(b, precision)).collect::<Result<_>>()?,
            norm: vector(&layers.norm)?,
            head: pack(&[&layers.head], true, precision)?,
        })
    }
}
