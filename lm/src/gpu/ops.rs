//! The operations of a pass on a GPU.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use rehearsal_kernels::attention::{Family, Heads};
use rehearsal_kernels::gpu::{
    ATTENTION, Buffer, ElementType, Factor, HEAD, KEY_TILE, KernelArgument, Layout, QUERY_TILE, ROWS, Table,
};
use rehearsal_kernels::rope::Angles;

use super::machine::{
    Gpu, NOTHING, Numbers, ROW_THREADS, VOCABULARY_THREADS, Weights, int, kind, place, row_major, shape, transposed,
};
use crate::model::{Layers, Projection};
use crate::pass::{Answers, Mlp, Norm, Ops, Question, Sum};

/// An error unless `kept` is empty: on a GPU the activations of one pass are not appended to those of another.
fn check_empty(kept: &Buffer) -> Result<()> {
    match kept.len() {
        0 => Ok(()),
        n => candle_core::bail!("{n} activations are kept there already"),
    }
}

impl Ops for Gpu {
    type Buffer = Buffer;
    type LogSums = Buffer;
    type Kept = Buffer;
    type Vector = Numbers;
    type Projection = Weights;
    type Angles = Arc<Table>;
    type Layout = Layout;
    /// Weights for the gradients of inputs.
    type Scratch = Buffer;

    fn wide(&self) -> Buffer {
        Buffer::empty(ElementType::F32)
    }

    fn narrow(&self) -> Buffer {
        Buffer::empty(self.launcher.element)
    }

    fn scratch(&self) -> Buffer {
        self.narrow()
    }

    fn vector(&self, tensor: &Tensor, plus: f32) -> Result<Numbers> {
        let mut buffer = self.wide();
        self.room(&mut buffer, tensor.elem_count())?;
        let moved = (tensor.to_dtype(DType::F32)? + plus as f64)?.contiguous()?;
        self.backend().copy(self.launcher.tensor(&moved)?, buffer.pointer(), 4 * buffer.len())?;
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
            self.backend().zero(bias.pointer(), 4 * bias.len())?;
            let mut at = 0;
            for part in parts {
                if let Some(tensor) = &part.bias {
                    let tensor = tensor.to_dtype(DType::F32)?.contiguous()?;
                    let target = bias.pointer() + 4 * at as u64;
                    self.backend().copy(self.launcher.tensor(&tensor)?, target, 4 * tensor.elem_count())?;
                }
                at += part.weight.dim(0)?;
            }
            projection.bias = Some(bias);
        }
        Ok(())
    }

    fn angles(&self, angles: &Arc<Angles>) -> Result<Arc<Table>> {
        self.table(angles)
    }

    fn layout(&self, positions: &[u32], families: &Arc<Vec<Family>>) -> Result<Layout> {
        Layout::new(&self.launcher, positions, families)
    }

    fn kept(&self) -> Buffer {
        self.narrow()
    }

    fn keep(&self, buffer: &mut Buffer, spent: bool, onto: &mut Buffer) -> Result<()> {
        check_empty(onto)?;
        if buffer.element != onto.element {
            self.room(onto, buffer.len())?;
            return self.launcher.each(&ROWS, "narrowed", buffer.len(), &[&*buffer, &*onto, &buffer.len()]);
        }
        if spent {
            std::mem::swap(buffer, onto);
            return Ok(());
        }
        self.copy(buffer, onto)
    }

    fn stack(&self, buffer: &mut Buffer, onto: &mut Buffer) -> Result<()> {
        check_empty(onto)?;
        std::mem::swap(buffer, onto);
        Ok(())
    }

    fn restore(&self, kept: Buffer, buffer: &mut Buffer) -> Result<()> {
        if kept.element == buffer.element {
            *buffer = kept;
            return Ok(());
        }
        self.room(buffer, kept.len())?;
        self.launcher.each(&ROWS, "widened", kept.len(), &[&kept, &*buffer, &kept.len()])
    }

    fn narrowed<'a>(&self, x: &'a Buffer, room: &'a mut Buffer) -> Result<&'a Buffer> {
        if x.element == self.launcher.element {
            return Ok(x);
        }
        self.room(room, x.len())?;
        self.launcher.each(&ROWS, "narrowed", x.len(), &[x, &*room, &x.len()])?;
        Ok(room)
    }

    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }

    fn zero(&self, buffer: &mut Buffer, len: usize) -> Result<()> {
        self.room(buffer, len)?;
        self.backend().zero(buffer.pointer(), len * buffer.element.bytes())
    }

    fn copy(&self, from: &Buffer, to: &mut Buffer) -> Result<()> {
        to.element = from.element;
        self.room(to, from.len())?;
        self.backend().copy(from.pointer(), to.pointer(), from.len() * from.element.bytes())
    }

    fn add(&self, x: &mut Buffer, y: &Buffer) -> Result<()> {
        self.launcher.each(&ROWS, "add", x.len(), &[&*x, y, &x.len()])
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
        let kernel = if out.element == self.launcher.element { "norm_rows" } else { "norm_wide" };
        let bias = norm.bias.as_ref().map_or(NOTHING, |b| b.0.pointer());
        let (all, layer) = (place(1, width, 0, width), i32::from(norm.layer));
        let arguments: [&dyn KernelArgument; 7] = [x, &all, &norm.weight.0, &bias, &norm.eps, &layer, &*out];
        self.launcher.rows(&ROWS, kernel, x.len() / width, ROW_THREADS, &arguments)
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
        let arguments: [&dyn KernelArgument; 8] = [x, grad, &all, &norm.weight.0, &norm.eps, &layer, &*dx, &stats];
        self.launcher.rows(&ROWS, "norm_back", rows, ROW_THREADS, &arguments)?;
        let dw = self.launcher.tensor(dw)?;
        self.fold(&ROWS, "norm_weight", &[x, grad, &all, &stats], &[], (rows, width), dw)?;
        match db {
            Some(db) if norm.layer => {
                let db = self.launcher.tensor(db)?;
                self.fold(&ROWS, "column_sums_wide", &[grad, &all], &[], (rows, width), db)
            }
            _ => Ok(()),
        }
    }

    fn head_norm(&self, qkv: &mut Buffer, norm: &Norm<Numbers>, at: usize, heads: usize, shape: &Heads) -> Result<()> {
        let rows = qkv.len() / shape.width();
        let all = place(heads, shape.width(), at, shape.dim);
        self.launcher.rows(&ROWS, "head_norm", rows * heads, 32, &[&*qkv, &all, &norm.weight.0, &norm.eps])
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
        self.launcher.rows(&ROWS, "head_norm_stats", vectors, 32, &[before, &all, &norm.eps, &stats])?;
        let sum = self.launcher.tensor(sum)?;
        let first: [&dyn KernelArgument; 4] = [before, &*grad, &all, &stats];
        self.fold(&ROWS, "head_norm_weight", &first, &[], (vectors, shape.dim), sum)?;
        let arguments: [&dyn KernelArgument; 6] = [before, &*grad, &all, &norm.weight.0, &norm.eps, &stats];
        self.launcher.rows(&ROWS, "head_norm_back", vectors, 32, &arguments)
    }

    fn rotate(&self, qkv: &mut Buffer, heads: &Heads, angles: &Arc<Table>, layout: &Layout, back: bool) -> Result<()> {
        let rows = qkv.len() / heads.width();
        let (rotated, half) = (heads.queries + heads.keys, heads.dim / 2);
        let sign: f32 = if back { -1.0 } else { 1.0 };
        let arguments: [&dyn KernelArgument; 9] = [
            &*qkv,
            &int(rows),
            &int(heads.width()),
            &int(rotated),
            &int(half),
            &layout.positions,
            &angles.cosines,
            &angles.sines,
            &sign,
        ];
        self.launcher.each(&ROWS, "rotate", rows * rotated * half, &arguments)
    }

    fn activate(&self, mlp: Mlp, input: &Buffer, out: &mut Buffer) -> Result<()> {
        let n = input.len() / mlp.input_width() * mlp.width;
        self.room(out, n)?;
        let (kind, gated, width) = kind(mlp);
        self.launcher.each(&ROWS, "activate", n, &[&kind, &gated, &width, &n, input, &*out])
    }

    fn activate_back(&self, mlp: Mlp, input: &mut Buffer, grad: &Buffer) -> Result<()> {
        let (kind, gated, width) = kind(mlp);
        let n = grad.len();
        self.launcher.each(&ROWS, "activate_back", n, &[&kind, &gated, &width, &n, &*input, grad])
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
        let grid = (layout.query_tiles.len() / QUERY_TILE, heads.queries);
        let shared = self.attention_shared().queries;
        let arguments: [&dyn KernelArgument; 5] = [qkv, &layout.query_tiles, &shape(heads), &*out, &*lse];
        self.launcher.run(&ATTENTION, "attention", grid, (128, 1), shared, &arguments)
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
        self.room(d_qkv, qkv.len())?;
        let mut delta = self.wide();
        self.room(&mut delta, lse.len())?;
        let n = lse.len();
        self.launcher.each(&ATTENTION, "attention_delta", 32 * n, &[out, grad, &n, &delta])?;
        let shape = shape(heads);
        let grid = (layout.query_tiles.len() / QUERY_TILE, heads.queries);
        let shared = self.attention_shared();
        let arguments: [&dyn KernelArgument; 7] = [qkv, grad, lse, &delta, &layout.query_tiles, &shape, &*d_qkv];
        self.launcher.run(&ATTENTION, "attention_queries", grid, (128, 1), shared.queries, &arguments)?;
        let grid = (layout.key_tiles.len() / KEY_TILE, heads.keys);
        let arguments: [&dyn KernelArgument; 8] =
            [qkv, grad, lse, &delta, &layout.positions, &layout.key_tiles, &shape, &*d_qkv];
        self.launcher.run(&ATTENTION, "attention_keys", grid, (128, 1), shared.keys, &arguments)
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
            let part = grad.at(at);
            let (g, x, sum) = (
                Factor { pointer: part, stride: wide, transposed: true },
                row_major(input.pointer(), inputs),
                self.launcher.tensor(weight)?,
            );
            if projection.turned {
                let (x, g) = (Factor { transposed: true, ..x }, Factor { transposed: false, ..g });
                self.gemm((inputs, rows, outputs), x, g, sum, outputs, ElementType::F32, true)?;
            } else {
                self.gemm((outputs, rows, inputs), g, x, sum, inputs, ElementType::F32, true)?;
            }
            if let Some(bias) = bias {
                let all = place(1, wide, at, outputs);
                let sum = self.launcher.tensor(bias)?;
                self.fold(&ROWS, "column_sums", &[grad, &all], &[], (rows, outputs), sum)?;
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
        let (a, b) = (row_major(grad.pointer(), outputs), row_major(weights.pointer(), inputs));
        self.gemm((rows, outputs, inputs), a, b, out.pointer(), inputs, out.element, false)
    }

    fn gather(&self, x: &Buffer, width: usize, rows: &[u32], out: &mut Buffer) -> Result<()> {
        self.room(out, rows.len() * width)?;
        let index = self.launcher.upload(rows)?;
        self.launcher.rows(&ROWS, "gather", rows.len(), ROW_THREADS, &[x, &index, &int(width), &*out])
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
            let arguments: [&dyn KernelArgument; 8] =
                [logits, &int(vocab), &targets, &scale, &cap, &at(start), &lse, &entropy];
            self.launcher.rows(&HEAD, "logprobs", n, VOCABULARY_THREADS, &arguments)
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
        let (grad, output, sum) =
            (self.launcher.tensor(&grad)?, self.launcher.tensor(&answers.output)?, self.launcher.tensor(sum)?);
        self.room(d_hidden, scored * width)?;
        let mut d_logits = self.narrow();
        self.logits(hidden, &matrix, (vocab, width), |first, n, logits| {
            let at = |pointer: u64| pointer + 4 * first as u64;
            let after = |pointer: u64| if question.entropy { at(pointer + 4 * scored as u64) } else { NOTHING };
            let (scale, cap) = (1.0 / question.temperature, question.softcap.unwrap_or(0.0));
            self.room(&mut d_logits, n * vocab)?;
            let arguments: [&dyn KernelArgument; 10] = [
                logits,
                &int(vocab),
                &at(targets.pointer()),
                &scale,
                &cap,
                &at(answers.lse.pointer()),
                &at(grad),
                &after(output),
                &after(grad),
                &d_logits,
            ];
            self.launcher.rows(&HEAD, "logprobs_back", n, VOCABULARY_THREADS, &arguments)?;
            let (d, x) = (d_hidden.at(first * width), hidden.at(first * width));
            let g = row_major(d_logits.pointer(), vocab);
            self.gemm((n, vocab, width), g, row_major(matrix.pointer(), width), d, width, d_hidden.element, false)?;
            let g = transposed(d_logits.pointer(), vocab);
            self.gemm((vocab, n, width), g, row_major(x, width), sum, width, ElementType::F32, true)
        })
    }

    fn scores(&self, hidden: &Buffer, weight: &Tensor) -> Result<Tensor> {
        let width = weight.elem_count();
        let rows = hidden.len() / width;
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let output = Tensor::zeros(rows, DType::F32, weight.device())?;
        let (w, out) = (self.launcher.tensor(&weight)?, self.launcher.tensor(&output)?);
        self.launcher.rows(&HEAD, "score", rows, ROW_THREADS, &[hidden, &w, &int(width), &out])?;
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
        self.launcher.each(&HEAD, "score_back", n, &[&g, &w, &int(width), &n, &*d_hidden])?;
        let sum = self.launcher.tensor(sum)?;
        self.fold(&ROWS, "score_weight", &[hidden, &g], &[&int(width)], (n / width, width), sum)
    }
}
