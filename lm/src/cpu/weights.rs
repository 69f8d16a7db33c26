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

/// Packs matrices side by side, as they are or each transposed, in the memory of `packed`.
pub fn pack_into(packed: &mut Packed, tensors: &[&Tensor], transposed: bool) -> Result<()> {
    fn typed<E: Element + WithDType>(packed: &mut Packed, tensors: &[&Tensor], transposed: bool) -> Result<()> {
        with_views::<E, _>(tensors, |views| {
            let turned: Vec<_> = views.iter().map(|v| if transposed { v.t() } else { *v }).collect();
            packed.fill(&turned, true);
            Ok(())
        })
    }
    match tensors.first().map(|t| t.dtype()) {
        Some(DType::BF16) => typed::<bf16>(packed, tensors, transposed),
        _ => typed::<f32>(packed, tensors, transposed),
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
    fn empty(precision: Precision) -> Self {
        Self { weight: Packed::empty(precision), bias: None }
    }

    fn fill(&mut self, parts: &[&Projection]) -> Result<()> {
        let weights: Vec<&Tensor> = parts.iter().map(|p| &p.weight).collect();
        pack_into(&mut self.weight, &weights, true)?;
        let mut bias = Vec::new();
        for part in parts {
            match &part.bias {
                Some(b) => bias.extend(vector(b)?),
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

    /// Columns of the result.
    pub fn width(&self) -> usize {
        self.weight.cols()
    }

    /// Precision of the product's factors.
    pub fn precision(&self) -> Precision {
        self.weight.precision()
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
    /// Nothing yet; [`PackedBlock::fill`] packs into it.
    pub fn empty(precision: Precision) -> Self {
        let projection = || PackedProjection::empty(precision);
        Self {
            input_norm: Vec::new(),
            qkv: projection(),
            o: projection(),
            post_norm: Vec::new(),
            gate_up: projection(),
            down: projection(),
        }
    }

    /// Packs a block's weights as they are now, in place of what was there.
    pub fn fill(&mut self, b: &Block) -> Result<()> {
        self.input_norm = vector(&b.input_norm.weight)?;
        self.post_norm = vector(&b.post_norm.weight)?;
        self.qkv.fill(&[&b.q, &b.k, &b.v])?;
        self.o.fill(&[&b.o])?;
        self.gate_up.fill(&[gate(b)?, &b.up])?;
        self.down.fill(&[&b.down])
    }
}

/// The gate of a block that has one, as those that are [served](super::serves) do.
pub fn gate(block: &Block) -> Result<&Projection> {
    block.gate.as_ref().ok_or_else(|| candle_core::Error::Msg("the MLP has no gate".into()))
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
        let block = |b: &Block| {
            let mut packed = PackedBlock::empty(precision);
            packed.fill(b).map(|()| packed)
        };
        let mut head = Packed::empty(precision);
        pack_into(&mut head, &[&layers.head], true)?;
        let blocks = layers.blocks.iter().map(block).collect::<Result<_>>()?;
        Ok(Self { blocks, norm: vector(&layers.norm.weight)?, head })
    }
}
