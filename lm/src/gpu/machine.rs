//! Weights of a model on a GPU, and the launches that [its operations](super::ops) are made of.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rehearsal_kernels::activation::Activation;
use rehearsal_kernels::attention::Heads;
use rehearsal_kernels::gemm::Precision;
use rehearsal_kernels::gpu::{
    AttentionShared, Buffer, Context, ElementType, Factor, Fields, Gemm, GpuBackend, KernelArgument, Launcher, ROWS,
    SourceFile, Table, by_target,
};
use rehearsal_kernels::rope::Angles;

use crate::model::{Layers, Projection};
use crate::pass::{Mlp, Ops};

/// Bytes of a block of logits, at most.
const LOGITS_MAX: usize = 256 << 20;

/// Rows per partial sum of a weight's gradient.
const CHUNK: usize = 256;

/// Threads per block of kernels with one block per row.
pub(super) const ROW_THREADS: u32 = 128;
/// Threads per block of kernels with one block per row of logits.
pub(super) const VOCABULARY_THREADS: u32 = 512;

/// A GPU that passes run on, with the element type of their products.
#[derive(Clone)]
pub struct Gpu {
    pub launcher: Launcher,
    context: Context,
}

/// Weight `[outputs, inputs]` and bias of projections of the same input, as one product.
pub struct Weights {
    pub(super) matrix: Buffer,
    pub(super) bias: Option<Buffer>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// Weight or bias of a norm, in f32.
pub struct Numbers(pub(super) Buffer);

impl Gpu {
    /// A GPU for models with heads of width `head_dim`.
    pub fn new(context: &Context, precision: Precision, head_dim: usize) -> Self {
        let element = match precision {
            Precision::F32 => ElementType::F32,
            Precision::Bf16 => ElementType::Bf16,
        };
        let launcher = Launcher { backend: context.backend.clone(), element, head_dim };
        Self { launcher, context: context.clone() }
    }

    pub(super) fn backend(&self) -> &dyn GpuBackend {
        &*self.launcher.backend
    }

    /// Resizes a buffer.
    pub fn room(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        buffer.resize(self.backend(), len)
    }

    /// Converts a tensor to the element type of a buffer and writes it there, from element `at` on.
    pub(super) fn narrow_tensor(&self, tensor: &Tensor, to: &Buffer, at: usize) -> Result<()> {
        let (n, target) = (tensor.elem_count(), to.at(at));
        match (tensor.dtype(), to.element) {
            (DType::F32, ElementType::F32) => self.backend().copy(self.launcher.tensor(tensor)?, target, 4 * n),
            (DType::BF16, ElementType::Bf16) => self.backend().copy(self.launcher.tensor(tensor)?, target, 2 * n),
            (DType::F32, _) => self.launcher.each(&ROWS, "narrowed", n, &[&self.launcher.tensor(tensor)?, &target, &n]),
            (DType::BF16, _) => {
                self.launcher.each(&ROWS, "narrowed_bf16", n, &[&self.launcher.tensor(tensor)?, &target, &n])
            }
            (other, _) => candle_core::bail!("weights on a GPU are f32 or bf16, not {other:?}"),
        }
    }

    /// Stacks the weights of `parts`, each `[outputs, inputs]`, along the outputs; returns the shape of the result.
    pub(super) fn stack(&self, parts: &[&Projection], to: &mut Buffer) -> Result<(usize, usize)> {
        let outputs = parts.iter().map(|p| p.weight.dim(0)).sum::<Result<usize>>()?;
        let inputs = parts.first().map_or(Ok(0), |p| p.weight.dim(1))?;
        self.room(to, outputs * inputs)?;
        let mut at = 0;
        for part in parts {
            if part.turned {
                let stored = part.weight.t()?.to_dtype(DType::F32)?;
                let (rows, columns) = stored.dims2()?;
                let target = to.at(at);
                let source = self.launcher.tensor(&stored)?;
                self.launcher.each(
                    &ROWS,
                    "transposed",
                    rows * columns,
                    &[&source, &int(rows), &int(columns), &target],
                )?;
            } else {
                self.narrow_tensor(&part.weight, to, at)?;
            }
            at += part.weight.elem_count();
        }
        Ok((outputs, inputs))
    }

    /// `c = a · b`, or `c += a · b` if `add` is set; `shape` is `(rows, depth, columns)`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn gemm(
        &self,
        shape: (usize, usize, usize),
        a: Factor,
        b: Factor,
        c: u64,
        c_stride: usize,
        c_element: ElementType,
        add: bool,
    ) -> Result<()> {
        let (rows, depth, columns) = shape;
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let element = self.launcher.element;
        self.backend().gemm(&Gemm { rows, depth, columns, element, a, b, c, c_stride, c_element, add })
    }

    /// `out = x · Wᵀ`, or `out += x · Wᵀ` if `add` is set, in the type of `out`; returns the number of rows.
    pub(super) fn multiply(&self, x: &Buffer, w: &Weights, out: &mut Buffer, add: bool) -> Result<usize> {
        let rows = x.len() / w.inputs;
        if !add {
            self.room(out, rows * w.outputs)?;
        }
        let (a, b) = (row_major(x.pointer(), w.inputs), transposed(w.matrix.pointer(), w.inputs));
        self.gemm((rows, w.inputs, w.outputs), a, b, out.pointer(), w.outputs, out.element, add)?;
        Ok(rows)
    }

    /// Adds a bias to the rows of `out`.
    pub(super) fn bias(&self, w: &Weights, out: &Buffer) -> Result<()> {
        let Some(bias) = &w.bias else { return Ok(()) };
        let kernel = if out.element == self.launcher.element { "add_bias" } else { "add_bias_wide" };
        self.launcher.each(&ROWS, kernel, out.len(), &[out, bias, &int(w.outputs), &out.len()])
    }

    /// Adds a sum over `vectors` vectors to `sum`. `kernel` computes partial sums; its arguments are `first`, the number of
    /// vectors, the vectors per partial sum, `last` and the partial sums.
    pub(super) fn fold(
        &self,
        file: &'static SourceFile,
        kernel: &'static str,
        first: &[&dyn KernelArgument],
        last: &[&dyn KernelArgument],
        (vectors, dim): (usize, usize),
        sum: u64,
    ) -> Result<()> {
        let chunks = vectors.div_ceil(CHUNK);
        let mut parts = self.wide();
        self.room(&mut parts, chunks * dim)?;
        let (n, chunk) = (int(vectors), int(CHUNK));
        let mut arguments: Vec<&dyn KernelArgument> = first.to_vec();
        arguments.extend([&n as &dyn KernelArgument, &chunk]);
        arguments.extend(last);
        arguments.push(&parts);
        self.launcher.run(file, kernel, (dim.div_ceil(32), chunks), (32, 8), 0, &arguments)?;
        self.launcher.each(&ROWS, "fold", dim, &[&parts, &int(chunks), &int(dim), &sum])
    }

    /// Adds each row of `x`, times `scale`, to the row of `table` that `ids` names.
    pub(super) fn add_rows(&self, x: &Buffer, ids: &[u32], scale: f32, width: usize, table: u64) -> Result<()> {
        let (targets, starts, order) = by_target(ids);
        let [targets_, starts, order] = [&targets, &starts, &order].map(|x| self.launcher.upload(x));
        let arguments: [&dyn KernelArgument; 7] = [x, &targets_?, &starts?, &order?, &scale, &int(width), &table];
        self.launcher.rows(&ROWS, "add_rows", targets.len(), ROW_THREADS, &arguments)
    }

    /// Rows per block of logits.
    fn logit_rows(vocab: usize) -> usize {
        (LOGITS_MAX / (4 * vocab)).max(1)
    }

    /// Calls `f(first row, rows, logits)` for each block of rows.
    pub fn logits(
        &self,
        hidden: &Buffer,
        head: &Buffer,
        (vocab, width): (usize, usize),
        mut f: impl FnMut(usize, usize, &Buffer) -> Result<()>,
    ) -> Result<()> {
        let rows = hidden.len() / width;
        let mut logits = self.wide();
        for first in (0..rows).step_by(Self::logit_rows(vocab)) {
            let n = Self::logit_rows(vocab).min(rows - first);
            self.room(&mut logits, n * vocab)?;
            let at = hidden.at(first * width);
            let (a, b) = (row_major(at, width), transposed(head.pointer(), width));
            self.gemm((n, width, vocab), a, b, logits.pointer(), vocab, ElementType::F32, false)?;
            f(first, n, &logits)?;
        }
        Ok(())
    }

    /// Computes the logits of all rows of `hidden`, in `logits`, whose memory is reused.
    pub fn logits_into(
        &self,
        hidden: &Buffer,
        head: &Buffer,
        (vocab, width): (usize, usize),
        logits: &mut Buffer,
    ) -> Result<()> {
        let rows = hidden.len() / width;
        self.room(logits, rows * vocab)?;
        let (a, b) = (row_major(hidden.pointer(), width), transposed(head.pointer(), width));
        self.gemm((rows, width, vocab), a, b, logits.pointer(), vocab, ElementType::F32, false)
    }

    /// Copies the elements of a buffer to another, which is not resized.
    pub fn overwrite(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        self.backend().copy(from.pointer(), to.pointer(), from.len() * from.element.bytes())
    }

    /// A head's weight in the element type of products.
    pub fn head(&self, head: &Tensor) -> Result<Buffer> {
        let mut matrix = self.narrow();
        self.room(&mut matrix, head.elem_count())?;
        self.narrow_tensor(head, &matrix, 0)?;
        Ok(matrix)
    }

    /// Shared memory of the attention kernels.
    pub(super) fn attention_shared(&self) -> AttentionShared {
        AttentionShared::of(self.launcher.head_dim, self.launcher.element)
    }

    /// The rotary table of `angles` on the device.
    pub(super) fn table(&self, angles: &Arc<Angles>) -> Result<Arc<Table>> {
        self.context.table(&self.launcher, angles)
    }

    /// Embeddings of tokens whose ids and positions are on the device.
    pub fn embed_rows(
        &self,
        layers: &Layers,
        scale: f32,
        ids: &Buffer,
        positions: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let width = layers.embed.dim(1)?;
        self.room(out, ids.len() * width)?;
        let kernel = if layers.embed.dtype() == DType::BF16 { "embed_bf16" } else { "embed" };
        let places = layers.positions.as_ref().map_or(Ok(NOTHING), |t| self.launcher.tensor(t))?;
        let table = self.launcher.tensor(&layers.embed)?;
        let arguments: [&dyn KernelArgument; 7] = [&table, &places, &scale, ids, positions, &int(width), &*out];
        self.launcher.rows(&ROWS, kernel, ids.len(), ROW_THREADS, &arguments)
    }
}

/// Converts to a kernel's `int`.
pub fn int(x: usize) -> i32 {
    x as i32
}

/// A row-major factor.
pub(super) fn row_major(pointer: u64, stride: usize) -> Factor {
    Factor { pointer, stride, transposed: false }
}

/// The transpose of a row-major matrix, as a factor.
pub(super) fn transposed(pointer: u64, stride: usize) -> Factor {
    Factor { pointer, stride, transposed: true }
}

/// `Place` of `rows.cu`.
pub(super) fn place(heads: usize, stride: usize, at: usize, dim: usize) -> Fields {
    Fields::new().int(heads).int(stride).int(at).int(dim)
}

/// `Shape` of `attention.cu` and `decode.cu`.
pub fn shape(heads: &Heads) -> Fields {
    Fields::new()
        .int(heads.queries)
        .int(heads.keys)
        .int(heads.width())
        .int(heads.query_width())
        .int(heads.query_width() + heads.key_width())
        .int(heads.window.unwrap_or(0))
        .float(heads.scale)
        .float(heads.softcap.unwrap_or(0.0))
}

/// Arguments of the activation kernels: GELU or SiLU, gated or not, columns of the result.
pub(super) fn kind(mlp: Mlp) -> (i32, i32, i32) {
    (i32::from(mlp.activation == Activation::GeluTanh), i32::from(mlp.gated), int(mlp.width))
}

/// A null pointer, for an argument that a kernel may do without.
pub(super) const NOTHING: u64 = 0;
