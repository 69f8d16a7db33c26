//! A GPU as a pass sees it: weights, norms and tables on the board, and the launches that [its operations](super::ops) are
//! made of.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Tensor};

use super::board::{Board, Factor, Narrow, Product};
use super::buffer::{Buffer, Fields, Launcher, Pass};
use super::layout::by_target;
use crate::kernels::attention::Heads;
use crate::kernels::gemm::Precision;
use crate::kernels::rope::Angles;
use crate::model::{Activation, Layers, Projection};
use crate::pass::{Mlp, Ops};

/// Bytes of logits that exist at a time.
const LOGITS_MAX: usize = 256 << 20;

/// Rows that a block sums up for the gradient of a weight.
const CHUNK: usize = 256;

/// Threads of a block that has a row.
pub(super) const ROW_THREADS: u32 = 128;
pub(super) const VOCABULARY_THREADS: u32 = 512;

/// A board with what a decoder keeps there between passes.
#[derive(Clone)]
pub struct Context {
    board: Arc<dyn Board>,
    tables: Arc<Mutex<Tables>>,
}

impl Context {
    /// Nothing kept yet.
    pub fn new(board: Arc<dyn Board>) -> Self {
        Self { board, tables: Arc::default() }
    }
}

/// A GPU, with the type of a pass's rows.
#[derive(Clone)]
pub struct Gpu {
    pub launcher: Launcher,
    tables: Arc<Mutex<Tables>>,
}

/// Rotary tables by where they lie on the host, which are held so that they stay there.
type Tables = BTreeMap<usize, (Arc<Angles>, Arc<Table>)>;

/// Cosines and sines on the device.
pub struct Table {
    pub(super) cosines: Buffer,
    pub(super) sines: Buffer,
}

/// Projections side by side, `[outputs, inputs]`.
pub struct Weights {
    pub(super) matrix: Buffer,
    pub(super) bias: Option<Buffer>,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// A norm's numbers.
pub struct Numbers(pub(super) Buffer);

impl Gpu {
    /// A board for models with heads of this width.
    pub fn new(context: &Context, precision: Precision, dim: usize) -> Self {
        let narrow = match precision {
            Precision::F32 => Narrow::F32,
            Precision::Bf16 => Narrow::Bf16,
        };
        let launcher = Launcher { board: context.board.clone(), narrow, dim };
        Self { launcher, tables: context.tables.clone() }
    }

    pub(super) fn board(&self) -> &dyn Board {
        &*self.launcher.board
    }

    /// Resizes a buffer.
    pub fn room(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        buffer.resize(self.board(), len)
    }

    /// A tensor's numbers, as the products read them, at an element of a buffer.
    pub(super) fn narrow_tensor(&self, tensor: &Tensor, to: &Buffer, at: usize) -> Result<()> {
        let (n, target) = (tensor.elem_count(), to.pointer() + (at * to.narrow.bytes()) as u64);
        match (tensor.dtype(), to.narrow) {
            (DType::F32, Narrow::F32) => self.board().copy(self.launcher.tensor(tensor)?, target, 4 * n),
            (DType::BF16, Narrow::Bf16) => self.board().copy(self.launcher.tensor(tensor)?, target, 2 * n),
            (DType::F32, _) => {
                self.launcher.each("rows", "narrowed", n, &[&self.launcher.tensor(tensor)?, &target, &n])
            }
            (DType::BF16, _) => {
                self.launcher.each("rows", "narrowed_bf16", n, &[&self.launcher.tensor(tensor)?, &target, &n])
            }
            (other, _) => candle_core::bail!("weights on a GPU are f32 or bf16, not {other:?}"),
        }
    }

    /// The parts' matrices under one another, each `[outputs, inputs]`.
    pub(super) fn stack(&self, parts: &[&Projection], to: &mut Buffer) -> Result<(usize, usize)> {
        let outputs = parts.iter().map(|p| p.weight.dim(0)).sum::<Result<usize>>()?;
        let inputs = parts.first().map_or(Ok(0), |p| p.weight.dim(1))?;
        self.room(to, outputs * inputs)?;
        let mut at = 0;
        for part in parts {
            if part.turned {
                let stored = part.weight.t()?.to_dtype(DType::F32)?;
                let (rows, columns) = stored.dims2()?;
                let target = to.pointer() + (at * to.narrow.bytes()) as u64;
                let source = self.launcher.tensor(&stored)?;
                self.launcher.each("rows", "turned", rows * columns, &[&source, &int(rows), &int(columns), &target])?;
            } else {
                self.narrow_tensor(&part.weight, to, at)?;
            }
            at += part.weight.elem_count();
        }
        Ok((outputs, inputs))
    }

    /// `c (+)= a · b` for buffers whose rows lie end to end.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn product(
        &self,
        shape: (usize, usize, usize),
        a: Factor,
        b: Factor,
        c: u64,
        c_stride: usize,
        c_type: Narrow,
        add: bool,
    ) -> Result<()> {
        let (rows, depth, columns) = shape;
        if rows == 0 || columns == 0 {
            return Ok(());
        }
        let narrow = self.launcher.narrow;
        self.board().product(&Product { rows, depth, columns, narrow, a, b, c, c_stride, c_type, add })
    }

    /// `out = x · Wᵀ` over the inputs of `w`, in the type of `out`.
    pub(super) fn multiply(&self, x: &Buffer, w: &Weights, out: &mut Buffer, add: bool) -> Result<usize> {
        let rows = x.len() / w.inputs;
        if !add {
            self.room(out, rows * w.outputs)?;
        }
        let (a, b) = (plain(x.pointer(), w.inputs), turned(w.matrix.pointer(), w.inputs));
        self.product((rows, w.inputs, w.outputs), a, b, out.pointer(), w.outputs, out.narrow, add)?;
        Ok(rows)
    }

    /// Adds a bias to the rows of `out`.
    pub(super) fn bias(&self, w: &Weights, out: &Buffer) -> Result<()> {
        let Some(bias) = &w.bias else { return Ok(()) };
        let kernel = if out.narrow == self.launcher.narrow { "add_bias" } else { "add_bias_wide" };
        self.launcher.each("rows", kernel, out.len(), &[out, bias, &int(w.outputs), &out.len()])
    }

    /// Sums over vectors by `kernel`, whose arguments begin with `first`, added to `sum`.
    pub(super) fn fold(
        &self,
        file: &'static str,
        kernel: &'static str,
        first: &[&dyn Pass],
        last: &[&dyn Pass],
        (vectors, dim): (usize, usize),
        sum: u64,
    ) -> Result<()> {
        let chunks = vectors.div_ceil(CHUNK);
        let mut parts = self.wide();
        self.room(&mut parts, chunks * dim)?;
        let (n, chunk) = (int(vectors), int(CHUNK));
        let mut arguments: Vec<&dyn Pass> = first.to_vec();
        arguments.extend([&n as &dyn Pass, &chunk]);
        arguments.extend(last);
        arguments.push(&parts);
        self.launcher.run(file, kernel, (dim.div_ceil(32), chunks), (32, 8), 0, &arguments)?;
        self.launcher.each("rows", "fold", dim, &[&parts, &int(chunks), &int(dim), &sum])
    }

    /// Adds rows of `x` to the rows of a table that `ids` names.
    pub(super) fn add_rows(&self, x: &Buffer, ids: &[u32], scale: f32, width: usize, table: u64) -> Result<()> {
        let (targets, starts, order) = by_target(ids);
        let [targets_, starts, order] = [&targets, &starts, &order].map(|x| self.launcher.upload(x));
        let arguments: [&dyn Pass; 7] = [x, &targets_?, &starts?, &order?, &scale, &int(width), &table];
        self.launcher.rows("rows", "add_rows", targets.len(), ROW_THREADS, &arguments)
    }

    /// Rows of logits that exist at a time.
    fn logit_rows(vocab: usize) -> usize {
        (LOGITS_MAX / (4 * vocab)).max(1)
    }

    /// Runs `f` on some rows of logits at a time: `(first row, rows, logits)`.
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
            let at = hidden.pointer() + (first * width * hidden.narrow.bytes()) as u64;
            let (a, b) = (plain(at, width), turned(head.pointer(), width));
            self.product((n, width, vocab), a, b, logits.pointer(), vocab, Narrow::F32, false)?;
            f(first, n, &logits)?;
        }
        Ok(())
    }

    /// All logits of some rows at once, in the same memory each time.
    pub fn logits_into(
        &self,
        hidden: &Buffer,
        head: &Buffer,
        (vocab, width): (usize, usize),
        logits: &mut Buffer,
    ) -> Result<()> {
        let rows = hidden.len() / width;
        self.room(logits, rows * vocab)?;
        let (a, b) = (plain(hidden.pointer(), width), turned(head.pointer(), width));
        self.product((rows, width, vocab), a, b, logits.pointer(), vocab, Narrow::F32, false)
    }

    /// Copies a buffer's numbers over those of another.
    pub fn overwrite(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        self.board().copy(from.pointer(), to.pointer(), from.len() * from.narrow.bytes())
    }

    /// A head's matrix as the products read it.
    pub fn head(&self, head: &Tensor) -> Result<Buffer> {
        let mut matrix = self.narrow();
        self.room(&mut matrix, head.elem_count())?;
        self.narrow_tensor(head, &matrix, 0)?;
        Ok(matrix)
    }

    /// Shared memory of an attention kernel, from how many rows and turned rows of a head it keeps.
    pub(super) fn shared(&self, rows: usize, turned: usize) -> usize {
        let pad = self.launcher.dim.next_multiple_of(16);
        (rows * (pad + SPREAD) + turned) * self.launcher.narrow.bytes()
    }

    /// Rotary tables on the device, brought there once.
    pub(super) fn table(&self, angles: &Arc<Angles>) -> Result<Arc<Table>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let key = Arc::as_ptr(angles) as usize;
        if let Some((_, table)) = tables.get(&key) {
            return Ok(table.clone());
        }
        let (cosines, sines) = angles.tables();
        let up = |x| self.launcher.upload_floats(x);
        let table = Arc::new(Table { cosines: up(cosines)?, sines: up(sines)? });
        tables.insert(key, (angles.clone(), table.clone()));
        Ok(table)
    }

    /// Embeddings of tokens whose numbers are on the device.
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
        let arguments: [&dyn Pass; 7] = [&table, &places, &scale, ids, positions, &int(width), &*out];
        self.launcher.rows("rows", kernel, ids.len(), ROW_THREADS, &arguments)
    }
}

/// Rows of a tile, and numbers between rows in shared memory, as `attention.cu` has them.
pub(super) const TILE: usize = 64;
pub(super) const SPREAD: usize = 8;
pub(super) const QUERIES: usize = 32;

/// An `int` of a kernel.
pub fn int(x: usize) -> i32 {
    x as i32
}

pub(super) fn plain(pointer: u64, stride: usize) -> Factor {
    Factor { pointer, stride, turned: false }
}

pub(super) fn turned(pointer: u64, stride: usize) -> Factor {
    Factor { pointer, stride, turned: true }
}

/// `Place` of the kernels.
pub(super) fn place(heads: usize, stride: usize, at: usize, dim: usize) -> Fields {
    Fields::new().int(heads).int(stride).int(at).int(dim)
}

/// `Shape` of the kernels of attention.
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

pub(super) fn kind(mlp: Mlp) -> (i32, i32, i32) {
    (i32::from(mlp.activation == Activation::GeluTanh), i32::from(mlp.gated), int(mlp.width))
}

pub(super) const NOTHING: u64 = 0;
