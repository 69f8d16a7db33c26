//! A pass on a GPU: the kernels of `kernels/*.cu`, and products by the board.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result, Tensor};

use super::board::{Board, Factor, Narrow, Product};
use super::buffer::{Buffer, Fields, Launcher, Pass};
use super::layout::{KEY_TILE, Layout, QUERY_TILE, by_target};
use crate::kernels::attention::{Family, Heads};
use crate::kernels::gemm::Precision;
use crate::kernels::rope::Angles;
use crate::model::{Activation, Layers, Projection};
use crate::pass::{Answers, Mlp, Norm, Ops, Question, Sum};

/// Bytes of logits that exist at a time.
const LOGITS_MAX: usize = 256 << 20;

/// Rows that a block sums up for the gradient of a weight.
const CHUNK: usize = 256;

/// Threads of a block that has a row.
const ROW_THREADS: u32 = 128;
const VOCABULARY_THREADS: u32 = 512;

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
    cosines: Buffer,
    sines: Buffer,
}

/// Projections side by side, `[outputs, inputs]`.
pub struct Weights {
    matrix: Buffer,
    bias: Option<Buffer>,
    outputs: usize,
    inputs: usize,
}

/// A norm's numbers.
pub struct Numbers(Buffer);

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

    fn board(&self) -> &dyn Board {
        &*self.launcher.board
    }

    /// Resizes a buffer.
    pub fn room(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        buffer.resize(self.board(), len)
    }

    /// A tensor's numbers, as the products read them, at an element of a buffer.
    fn narrow_tensor(&self, tensor: &Tensor, to: &Buffer, at: usize) -> Result<()> {
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
    fn stack(&self, parts: &[&Projection], to: &mut Buffer) -> Result<(usize, usize)> {
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
    fn product(
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
    fn multiply(&self, x: &Buffer, w: &Weights, out: &mut Buffer, add: bool) -> Result<usize> {
        let rows = x.len() / w.inputs;
        if !add {
            self.room(out, rows * w.outputs)?;
        }
        let (a, b) = (plain(x.pointer(), w.inputs), turned(w.matrix.pointer(), w.inputs));
        self.product((rows, w.inputs, w.outputs), a, b, out.pointer(), w.outputs, out.narrow, add)?;
        Ok(rows)
    }

    /// Adds a bias to the rows of `out`.
    fn bias(&self, w: &Weights, out: &Buffer) -> Result<()> {
        let Some(bias) = &w.bias else { return Ok(()) };
        let kernel = if out.narrow == self.launcher.narrow { "add_bias" } else { "add_bias_wide" };
        self.launcher.each("rows", kernel, out.len(), &[out, bias, &int(w.outputs), &out.len()])
    }

    /// Sums over vectors by `kernel`, whose arguments begin with `first`, added to `sum`.
    fn fold(
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
    fn add_rows(&self, x: &Buffer, ids: &[u32], scale: f32, width: usize, table: u64) -> Result<()> {
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
    fn shared(&self, rows: usize, turned: usize) -> usize {
        let pad = self.launcher.dim.next_multiple_of(16);
        (rows * (pad + SPREAD) + turned) * self.launcher.narrow.bytes()
    }
}

/// Rows of a tile, and numbers between rows in shared memory, as `attention.cu` has them.
const TILE: usize = 64;
const SPREAD: usize = 8;
const QUERIES: usize = 32;

/// An `int` of a kernel.
pub fn int(x: usize) -> i32 {
    x as i32
}

fn plain(pointer: u64, stride: usize) -> Factor {
    Factor { pointer, stride, turned: false }
}

fn turned(pointer: u64, stride: usize) -> Factor {
    Factor { pointer, stride, turned: true }
}

/// `Place` of the kernels.
fn place(heads: usize, stride: usize, at: usize, dim: usize) -> Fields {
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

fn kind(mlp: Mlp) -> (i32, i32, i32) {
    (i32::from(mlp.activation == Activation::GeluTanh), i32::from(mlp.gated), int(mlp.width))
}

const NOTHING: u64 = 0;

impl Ops for Gpu {
    type Buffer = Buffer;
    type Kept = Buffer;
    type Vector = Numbers;
    type Projection = Weights;
    type Angles = Arc<Table>;
    type Layout = Layout;
    /// Weights of the products that lead back.
    type Scratch = Buffer;

    fn wide(&self) -> Buffer {
        Buffer::empty(Narrow::F32)
    }

    fn narrow(&self) -> Buffer {
        Buffer::empty(self.launcher.narrow)
    }

    fn scratch(&self) -> Buffer {
        self.narrow()
    }

    fn vector(&self, tensor: &Tensor, plus: f32) -> Result<Numbers> {
        let mut buffer = self.wide();
        self.room(&mut buffer, tensor.elem_count())?;
        let moved = (tensor.to_dtype(DType::F32)? + plus as f64)?.contiguous()?;
        self.board().copy(self.launcher.tensor(&moved)?, buffer.pointer(), 4 * buffer.len())?;
        Ok(Numbers(buffer))
    }

    fn projection(&self) -> Weights {
        Weights { matrix: self.narrow(), bias: None, outputs: 0, inputs: 0 }
    }

    fn fill(&self, projection: &mut Weights, parts: &[&Projection]) -> Result<()> {
        (projection.outputs, projection.inputs) = self.stack(parts, &mut projection.matrix)?;
        projection.bias = None;
        if parts.iter().any(|p| p.bias.is_some()) {
            let mut bias = self.wide();
            self.room(&mut bias, projection.outputs)?;
            self.board().zero(bias.pointer(), 4 * bias.len())?;
            let mut at = 0;
            for part in parts {
                if let Some(tensor) = &part.bias {
                    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
                    let target = bias.pointer() + 4 * at as u64;
                    self.board().copy(self.launcher.tensor(&tensor)?, target, 4 * tensor.elem_count())?;
                }
                at += part.weight.dim(0)?;
            }
            projection.bias = Some(bias);
        }
        Ok(())
    }

    fn angles(&self, angles: &Arc<Angles>) -> Result<Arc<Table>> {
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

    fn layout(&self, positions: &[u32], families: &Arc<Vec<Family>>) -> Result<Layout> {
        Layout::new(&self.launcher, positions, families)
    }

    fn keep(&self, buffer: &Buffer) -> Result<Buffer> {
        let mut kept = self.narrow();
        if buffer.narrow == kept.narrow {
            self.copy(buffer, &mut kept)?;
        } else {
            self.room(&mut kept, buffer.len())?;
            self.launcher.each("rows", "narrowed", buffer.len(), &[buffer, &kept, &buffer.len()])?;
        }
        Ok(kept)
    }

    fn take(&self, buffer: &mut Buffer) -> Result<Buffer> {
        let empty = Buffer::empty(buffer.narrow);
        Ok(std::mem::replace(buffer, empty))
    }

    fn restore(&self, kept: Buffer, buffer: &mut Buffer) -> Result<()> {
        if kept.narrow == buffer.narrow {
            *buffer = kept;
            return Ok(());
        }
        self.room(buffer, kept.len())?;
        self.launcher.each("rows", "widened", kept.len(), &[&kept, &*buffer, &kept.len()])
    }

    fn narrowed<'a>(&self, x: &'a Buffer, room: &'a mut Buffer) -> Result<&'a Buffer> {
        if x.narrow == self.launcher.narrow {
            return Ok(x);
        }
        self.room(room, x.len())?;
        self.launcher.each("rows", "narrowed", x.len(), &[x, &*room, &x.len()])?;
        Ok(room)
    }

    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }

    fn zero(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        self.room(buffer, len)?;
        self.board().zero(buffer.pointer(), len * buffer.narrow.bytes())
    }

    fn copy(&self, from: &Buffer, to: &mut Buffer) -> Result<()> {
        to.narrow = from.narrow;
        self.room(to, from.len())?;
        self.board().copy(from.pointer(), to.pointer(), from.len() * from.narrow.bytes())
    }

    fn add(&self, x: &mut Buffer, y: &Buffer) -> Result<()> {
        self.launcher.each("rows", "add", x.len(), &[&*x, y, &x.len()])
    }

    fn embed(&self, layers: &Layers, scale: f32, ids: &[u32], positions: &[u32], out: &mut Buffer) -> Result<()> {
        let (ids, positions) = (self.launcher.upload(ids)?, self.launcher.upload(positions)?);
        self.embed_rows(layers, scale, &ids, &positions, out)
    }

    fn embed_back(&self, ids: &[u32], scale: f32, grad: &Buffer, sum: &Tensor) -> Result<()> {
        self.add_rows(grad, ids, scale, sum.dim(1)?, self.launcher.tensor(sum)?)
    }

    fn norm(&self, x: &Buffer, norm: &Norm<Numbers>, out: &mut Buffer) -> Result<()> {
        let width = norm.weight.0.len();
        self.room(out, x.len())?;
        let kernel = if out.narrow == self.launcher.narrow { "norm_rows" } else { "norm_wide" };
        let bias = norm.bias.as_ref().map_or(NOTHING, |b| b.0.pointer());
        let (all, layer) = (place(1, width, 0, width), i32::from(norm.layer));
        let arguments: [&dyn Pass; 7] = [x, &all, &norm.weight.0, &bias, &norm.eps, &layer, &*out];
        self.launcher.rows("rows", kernel, x.len() / width, ROW_THREADS, &arguments)
    }

    fn norm_back(
        &self,
        x: &Buffer,
        norm: &Norm<Numbers>,
        grad: &Buffer,
        dx: &mut Buffer,
        (dw, db): (&Tensor, Option<&Tensor>),
    ) -> Result<()> {
        let width = norm.weight.0.len();
        let rows = x.len() / width;
        let mut stats = self.wide();
        self.room(&mut stats, 2 * rows)?;
        let (all, layer) = (place(1, width, 0, width), i32::from(norm.layer));
        let arguments: [&dyn Pass; 8] = [x, grad, &all, &norm.weight.0, &norm.eps, &layer, &*dx, &stats];
        self.launcher.rows("rows", "norm_back", rows, ROW_THREADS, &arguments)?;
        let dw = self.launcher.tensor(dw)?;
        self.fold("rows", "norm_weight", &[x, grad, &all, &stats], &[], (rows, width), dw)?;
        match db {
            Some(db) if norm.layer => {
                let db = self.launcher.tensor(db)?;
                self.fold("rows", "column_sums_wide", &[grad, &all], &[], (rows, width), db)
            }
            _ => Ok(()),
        }
    }

    fn head_norm(&self, qkv: &mut Buffer, norm: &Norm<Numbers>, at: usize, heads: usize, shape: &Heads) -> Result<()> {
        let rows = qkv.len() / shape.width();
        let all = place(heads, shape.width(), at, shape.dim);
        self.launcher.rows("rows", "head_norm", rows * heads, 32, &[&*qkv, &all, &norm.weight.0, &norm.eps])
    }

    fn head_norm_back(
        &self,
        before: &Buffer,
        norm: &Norm<Numbers>,
        at: usize,
        heads: usize,
        shape: &Heads,
        grad: &mut Buffer,
        sum: &Tensor,
    ) -> Result<()> {
        let vectors = before.len() / shape.width() * heads;
        let all = place(heads, shape.width(), at, shape.dim);
        let mut stats = self.wide();
        self.room(&mut stats, 2 * vectors)?;
        self.launcher.rows("rows", "head_norm_stats", vectors, 32, &[before, &all, &norm.eps, &stats])?;
        let sum = self.launcher.tensor(sum)?;
        let first: [&dyn Pass; 4] = [before, &*grad, &all, &stats];
        self.fold("rows", "head_norm_weight", &first, &[], (vectors, shape.dim), sum)?;
        let arguments: [&dyn Pass; 6] = [before, &*grad, &all, &norm.weight.0, &norm.eps, &stats];
        self.launcher.rows("rows", "head_norm_back", vectors, 32, &arguments)
    }

    fn rotate(&self, qkv: &mut Buffer, heads: &Heads, angles: &Arc<Table>, layout: &Layout, back: bool) -> Result<()> {
        let rows = qkv.len() / heads.width();
        let (turned, half) = (heads.queries + heads.keys, heads.dim / 2);
        let sign: f32 = if back { -1.0 } else { 1.0 };
        let arguments: [&dyn Pass; 9] = [
            &*qkv,
            &int(rows),
            &int(heads.width()),
            &int(turned),
            &int(half),
            &layout.positions,
            &angles.cosines,
            &angles.sines,
            &sign,
        ];
        self.launcher.each("rows", "rotate", rows * turned * half, &arguments)
    }

    fn activate(&self, mlp: Mlp, input: &Buffer, out: &mut Buffer) -> Result<()> {
        let n = input.len() / mlp.input_width() * mlp.width;
        self.room(out, n)?;
        let (kind, gated, width) = kind(mlp);
        self.launcher.each("rows", "activate", n, &[&kind, &gated, &width, &n, input, &*out])
    }

    fn activate_back(&self, mlp: Mlp, input: &mut Buffer, grad: &Buffer) -> Result<()> {
        let (kind, gated, width) = kind(mlp);
        let n = grad.len();
        self.launcher.each("rows", "activate_back", n, &[&kind, &gated, &width, &n, &*input, grad])
    }

    fn attention(
        &self,
        qkv: &Buffer,
        layout: &Layout,
        heads: &Heads,
        out: &mut Buffer,
        lse: &mut Buffer,
    ) -> Result<()> {
        let rows = qkv.len() / heads.width();
        self.room(out, rows * heads.query_width())?;
        self.room(lse, rows * heads.queries)?;
        let pad = heads.dim.next_multiple_of(16);
        let grid = (layout.query_tiles.len() / QUERY_TILE, heads.queries);
        let shared = self.shared(TILE, pad * (TILE + SPREAD));
        let arguments: [&dyn Pass; 5] = [qkv, &layout.query_tiles, &shape(heads), &*out, &*lse];
        self.launcher.run("attention", "attention", grid, (128, 1), shared, &arguments)
    }

    fn attention_back(
        &self,
        qkv: &Buffer,
        out: &Buffer,
        lse: &Buffer,
        grad: &Buffer,
        layout: &Layout,
        heads: &Heads,
        d_qkv: &mut Buffer,
    ) -> Result<()> {
        let pad = heads.dim.next_multiple_of(16);
        self.room(d_qkv, qkv.len())?;
        let mut delta = self.wide();
        self.room(&mut delta, lse.len())?;
        let n = lse.len();
        self.launcher.each("attention", "attention_delta", 32 * n, &[out, grad, &n, &delta])?;
        let shape = shape(heads);
        let grid = (layout.query_tiles.len() / QUERY_TILE, heads.queries);
        let shared = self.shared(2 * TILE, pad * (TILE + SPREAD));
        let arguments: [&dyn Pass; 7] = [qkv, grad, lse, &delta, &layout.query_tiles, &shape, &*d_qkv];
        self.launcher.run("attention", "attention_queries", grid, (128, 1), shared, &arguments)?;
        let grid = (layout.key_tiles.len() / KEY_TILE, heads.keys);
        let shared = self.shared(2 * TILE, 2 * pad * (QUERIES + SPREAD));
        let arguments: [&dyn Pass; 8] = [qkv, grad, lse, &delta, &layout.positions, &layout.key_tiles, &shape, &*d_qkv];
        self.launcher.run("attention", "attention_keys", grid, (128, 1), shared, &arguments)
    }

    fn project(&self, x: &Buffer, w: &Weights, out: &mut Buffer) -> Result<()> {
        self.multiply(x, w, out, false)?;
        self.bias(w, out)
    }

    fn project_onto(&self, x: &Buffer, w: &Weights, _: &mut Buffer, onto: &mut Buffer) -> Result<()> {
        self.multiply(x, w, onto, true)?;
        self.bias(w, onto)
    }

    fn weight_gradients(
        &self,
        rows: usize,
        sums: &[Sum<'_>],
        grad: &Buffer,
        input: &Buffer,
        _: &mut Buffer,
    ) -> Result<()> {
        let (wide, inputs) = (grad.len() / rows.max(1), input.len() / rows.max(1));
        let mut at = 0;
        for Sum { projection, weight, bias } in sums {
            let outputs = projection.weight.dim(0)?;
            let part = grad.pointer() + (at * grad.narrow.bytes()) as u64;
            let (g, x, sum) = (
                Factor { pointer: part, stride: wide, turned: true },
                plain(input.pointer(), inputs),
                self.launcher.tensor(weight)?,
            );
            if projection.turned {
                let (x, g) = (Factor { turned: true, ..x }, Factor { turned: false, ..g });
                self.product((inputs, rows, outputs), x, g, sum, outputs, Narrow::F32, true)?;
            } else {
                self.product((outputs, rows, inputs), g, x, sum, inputs, Narrow::F32, true)?;
            }
            if let Some(bias) = bias {
                let all = place(1, wide, at, outputs);
                let sum = self.launcher.tensor(bias)?;
                self.fold("rows", "column_sums", &[grad, &all], &[], (rows, outputs), sum)?;
            }
            at += outputs;
        }
        Ok(())
    }

    fn input_gradients(
        &self,
        parts: &[&Projection],
        grad: &Buffer,
        out: &mut Buffer,
        weights: &mut Buffer,
    ) -> Result<()> {
        let (outputs, inputs) = self.stack(parts, weights)?;
        let rows = grad.len() / outputs;
        self.room(out, rows * inputs)?;
        let (a, b) = (plain(grad.pointer(), outputs), plain(weights.pointer(), inputs));
        self.product((rows, outputs, inputs), a, b, out.pointer(), inputs, out.narrow, false)
    }

    fn gather(&self, x: &Buffer, width: usize, rows: &[u32], out: &mut Buffer) -> Result<()> {
        self.room(out, rows.len() * width)?;
        let index = self.launcher.upload(rows)?;
        self.launcher.rows("rows", "gather", rows.len(), ROW_THREADS, &[x, &index, &int(width), &*out])
    }

    fn scatter(&self, x: &Buffer, width: usize, rows: &[u32], tokens: usize, out: &mut Buffer) -> Result<()> {
        self.zero(out, tokens * width)?;
        self.add_rows(x, rows, 1.0, width, out.pointer())
    }

    fn answer(&self, hidden: &Buffer, head: &Tensor, question: Question<'_>) -> Result<Answers<Buffer>> {
        let (vocab, width) = head.dims2()?;
        let scored = question.targets.len();
        let matrix = self.head(head)?;
        let targets = self.launcher.upload(question.targets)?;
        let asked = if question.entropy { 2 * scored } else { scored };
        let output = Tensor::zeros(asked, DType::F32, head.device())?;
        let start = self.launcher.tensor(&output)?;
        let mut lse = self.wide();
        self.room(&mut lse, scored)?;
        self.logits(hidden, &matrix, (vocab, width), |first, n, logits| {
            let at = |pointer: u64| pointer + 4 * first as u64;
            let entropy = if question.entropy { at(start + 4 * scored as u64) } else { NOTHING };
            let (scale, cap) = (1.0 / question.temperature, question.softcap.unwrap_or(0.0));
            let (targets, lse) = (at(targets.pointer()), at(lse.pointer()));
            let arguments: [&dyn Pass; 8] = [logits, &int(vocab), &targets, &scale, &cap, &at(start), &lse, &entropy];
            self.launcher.rows("head", "answer", n, VOCABULARY_THREADS, &arguments)
        })?;
        Ok(Answers { output, lse })
    }

    fn answer_back(
        &self,
        hidden: &Buffer,
        head: &Tensor,
        question: Question<'_>,
        answers: &Answers<Buffer>,
        grad: &Tensor,
        d_hidden: &mut Buffer,
        sum: &Tensor,
    ) -> Result<()> {
        let (vocab, width) = head.dims2()?;
        let scored = question.targets.len();
        let matrix = self.head(head)?;
        let targets = self.launcher.upload(question.targets)?;
        let grad = grad.to_dtype(DType::F32)?.contiguous()?;
        let (grad, said, sum) =
            (self.launcher.tensor(&grad)?, self.launcher.tensor(&answers.output)?, self.launcher.tensor(sum)?);
        self.room(d_hidden, scored * width)?;
        let mut d_logits = self.narrow();
        self.logits(hidden, &matrix, (vocab, width), |first, n, logits| {
            let at = |pointer: u64| pointer + 4 * first as u64;
            let after = |pointer: u64| if question.entropy { at(pointer + 4 * scored as u64) } else { NOTHING };
            let (scale, cap) = (1.0 / question.temperature, question.softcap.unwrap_or(0.0));
            self.room(&mut d_logits, n * vocab)?;
            let arguments: [&dyn Pass; 10] = [
                logits,
                &int(vocab),
                &at(targets.pointer()),
                &scale,
                &cap,
                &at(answers.lse.pointer()),
                &at(grad),
                &after(said),
                &after(grad),
                &d_logits,
            ];
            self.launcher.rows("head", "answer_back", n, VOCABULARY_THREADS, &arguments)?;
            let rows_at = (first * width) as u64;
            let d = d_hidden.pointer() + rows_at * d_hidden.narrow.bytes() as u64;
            let x = hidden.pointer() + rows_at * hidden.narrow.bytes() as u64;
            let g = plain(d_logits.pointer(), vocab);
            self.product((n, vocab, width), g, plain(matrix.pointer(), width), d, width, d_hidden.narrow, false)?;
            let g = turned(d_logits.pointer(), vocab);
            self.product((vocab, n, width), g, plain(x, width), sum, width, Narrow::F32, true)
        })
    }

    fn scores(&self, hidden: &Buffer, weight: &Tensor) -> Result<Tensor> {
        let width = weight.elem_count();
        let rows = hidden.len() / width;
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let output = Tensor::zeros(rows, DType::F32, weight.device())?;
        let (w, out) = (self.launcher.tensor(&weight)?, self.launcher.tensor(&output)?);
        self.launcher.rows("head", "score", rows, ROW_THREADS, &[hidden, &w, &int(width), &out])?;
        Ok(output)
    }

    fn scores_back(
        &self,
        hidden: &Buffer,
        weight: &Tensor,
        grad: &Tensor,
        d_hidden: &mut Buffer,
        sum: &Tensor,
    ) -> Result<()> {
        let width = weight.elem_count();
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let grad = grad.to_dtype(DType::F32)?.contiguous()?;
        let (w, g) = (self.launcher.tensor(&weight)?, self.launcher.tensor(&grad)?);
        let n = hidden.len();
        self.room(d_hidden, n)?;
        self.launcher.each("head", "score_back", n, &[&g, &w, &int(width), &n, &*d_hidden])?;
        let sum = self.launcher.tensor(sum)?;
        self.fold("rows", "score_weight", &[hidden, &g], &[&int(width)], (n / width, width), sum)
    }
}

impl Gpu {
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
