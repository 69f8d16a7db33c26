//! The operations of a pass on the CPU.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use half::bf16;
use rehearsal_kernels::attention::{self, Family, Heads, Saved};
use rehearsal_kernels::gemm::{self, Element, Packed, View};
use rehearsal_kernels::head::{self, Targets};
use rehearsal_kernels::math::{LogSum, dot};
use rehearsal_kernels::rope::{Angles, rotate};
use rehearsal_kernels::{activation, norm};

use super::kept::{Kept, round_onto, widened};
use super::machine::{Cpu, Layout};
use super::rows::{add, gather, lookup};
use super::weights::{PackedProjection, as_floats, pack_into, with_views};
use crate::model::{Layers, Projection};
use crate::ops::with_floats_mut;
use crate::pass::{Answers, Mlp, Norm, Ops, Question, Sum};

fn targets<'a>(question: &Question<'a>) -> Targets<'a> {
    Targets { tokens: question.targets, temperature: question.temperature, softcap: question.softcap }
}

impl Cpu {
    fn ask<E: Element>(&self, hidden: &[f32], head: View<'_, E>, question: &Question<'_>) -> (Vec<f32>, Vec<LogSum>) {
        let targets = targets(question);
        let (mut output, lse) = head::logprobs(hidden, head, targets, self.0);
        if question.entropy {
            output.extend(head::entropies(hidden, head, &lse, targets, self.0));
        }
        (output, lse)
    }
}

impl Ops for Cpu {
    type Buffer = Vec<f32>;
    type LogSums = Vec<LogSum>;
    type Kept = Kept;
    type Vector = Vec<f32>;
    type Projection = PackedProjection;
    type Angles = Arc<Angles>;
    type Layout = Layout;
    /// Packed factors: the input of a projection, for weight gradients; a weight, for input gradients.
    type Scratch = (Packed, Packed);

    fn wide(&self) -> Vec<f32> {
        Vec::new()
    }

    fn narrow(&self) -> Vec<f32> {
        Vec::new()
    }

    fn scratch(&self) -> (Packed, Packed) {
        (Packed::empty(self.0), Packed::empty(self.0))
    }

    fn vector(&self, tensor: &Tensor, plus: f32) -> Result<Vec<f32>> {
        let mut all = as_floats(tensor)?;
        if plus != 0.0 {
            all.iter_mut().for_each(|x| *x += plus);
        }
        Ok(all)
    }

    fn projection(&self) -> PackedProjection {
        PackedProjection::empty(self.0)
    }

    fn fill(&self, projection: &mut PackedProjection, parts: &[&Projection]) -> Result<()> {
        projection.fill(parts)
    }

    fn angles(&self, angles: &Arc<Angles>) -> Result<Arc<Angles>> {
        Ok(angles.clone())
    }

    fn layout(&self, positions: &[u32], families: &Arc<Vec<Family>>) -> Result<Layout> {
        Ok(Layout { positions: positions.to_vec(), families: families.clone() })
    }

    fn kept(&self) -> Kept {
        Kept::with_capacity(self.0, 0)
    }

    fn keep(&self, buffer: &mut Vec<f32>, spent: bool, onto: &mut Kept) -> Result<()> {
        match onto {
            Kept::F32(data) if spent => self.stack(buffer, data)?,
            Kept::F32(data) => data.extend_from_slice(buffer),
            Kept::Bf16(data) => round_onto(data, buffer),
            Kept::Recalled(_) => candle_core::bail!("recorded activations cannot be appended to"),
        }
        Ok(())
    }

    fn stack(&self, buffer: &mut Vec<f32>, onto: &mut Vec<f32>) -> Result<()> {
        match onto.capacity() {
            0 => *onto = std::mem::take(buffer),
            _ => onto.extend_from_slice(buffer),
        }
        Ok(())
    }

    fn restore(&self, kept: Kept, buffer: &mut Vec<f32>) -> Result<()> {
        match kept {
            Kept::F32(data) => *buffer = data,
            Kept::Bf16(data) => widened(&data, buffer),
            Kept::Recalled(recalled) => recalled.gather(buffer)?,
        }
        Ok(())
    }

    fn narrowed<'a>(&self, x: &'a Vec<f32>, _: &'a mut Vec<f32>) -> Result<&'a Vec<f32>> {
        Ok(x)
    }

    fn len(&self, buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn zero(&self, buffer: &mut Vec<f32>, len: usize) -> Result<()> {
        buffer.clear();
        buffer.resize(len, 0.0);
        Ok(())
    }

    fn copy(&self, from: &Vec<f32>, to: &mut Vec<f32>) -> Result<()> {
        to.clone_from(from);
        Ok(())
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>) -> Result<()> {
        add(x, y);
        Ok(())
    }

    fn embed(&self, layers: &Layers, scale: f32, ids: &[u32], positions: &[u32], out: &mut Vec<f32>) -> Result<()> {
        lookup(&layers.embed, ids, out)?;
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= scale);
        }
        if let Some(table) = &layers.positions {
            let mut places = Vec::new();
            lookup(table, positions, &mut places)?;
            add(out, &places);
        }
        Ok(())
    }

    fn embed_back(&self, ids: &[u32], scale: f32, grad: &Vec<f32>, sum: &Tensor) -> Result<()> {
        let width = sum.dim(1)?;
        with_floats_mut(sum, |table| {
            for (&id, row) in ids.iter().zip(grad.chunks_exact(width)) {
                let at = id as usize * width;
                for (sum, x) in table[at..at + width].iter_mut().zip(row) {
                    *sum += x * scale;
                }
            }
            Ok(())
        })
    }

    fn norm(&self, x: &Vec<f32>, norm: &Norm<Vec<f32>>, out: &mut Vec<f32>) -> Result<()> {
        out.resize(x.len(), 0.0);
        match &norm.bias {
            Some(bias) if norm.layer => norm::layer_norm(x, &norm.weight, bias, norm.eps, out),
            _ => norm::rms_norm(x, &norm.weight, norm.eps, out),
        }
        Ok(())
    }

    fn norm_back(
        &self,
        x: &Vec<f32>,
        norm: &Norm<Vec<f32>>,
        grad: &Vec<f32>,
        dx: &mut Vec<f32>,
        (dw, db): (&Tensor, Option<&Tensor>),
    ) -> Result<()> {
        with_floats_mut(dw, |dw| match db {
            Some(db) if norm.layer => with_floats_mut(db, |db| {
                norm::layer_norm_backward(x, &norm.weight, norm.eps, grad, dx, dw, db);
                Ok(())
            }),
            _ => {
                norm::rms_norm_backward(x, &norm.weight, norm.eps, grad, dx, dw);
                Ok(())
            }
        })
    }

    fn head_norm(
        &self,
        qkv: &mut Vec<f32>,
        norm: &Norm<Vec<f32>>,
        at: usize,
        heads: usize,
        shape: &Heads,
    ) -> Result<()> {
        norm::head_norm(qkv, shape.width(), at..at + heads * shape.dim, &norm.weight, norm.eps);
        Ok(())
    }

    fn head_norm_back(
        &self,
        before: &Vec<f32>,
        norm: &Norm<Vec<f32>>,
        at: usize,
        heads: usize,
        shape: &Heads,
        grad: &mut Vec<f32>,
        sum: &Tensor,
    ) -> Result<()> {
        with_floats_mut(sum, |dw| {
            let columns = at..at + heads * shape.dim;
            norm::head_norm_backward(before, shape.width(), columns, &norm.weight, norm.eps, grad, dw);
            Ok(())
        })
    }

    fn rotate(
        &self,
        qkv: &mut Vec<f32>,
        heads: &Heads,
        angles: &Arc<Angles>,
        layout: &Layout,
        back: bool,
    ) -> Result<()> {
        rotate(qkv, heads.query_width() + heads.key_width(), angles, &layout.positions, back);
        Ok(())
    }

    fn activate(&self, mlp: Mlp, input: &Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        out.resize(input.len() / mlp.input_width() * mlp.width, 0.0);
        activation::forward(mlp.activation, mlp.gated, mlp.width, input, out);
        Ok(())
    }

    fn activate_back(&self, mlp: Mlp, input: &mut Vec<f32>, grad: &Vec<f32>) -> Result<()> {
        activation::backward(mlp.activation, mlp.gated, mlp.width, input, grad);
        Ok(())
    }

    fn attention(
        &self,
        qkv: &Vec<f32>,
        layout: &Layout,
        heads: &Heads,
        out: &mut Vec<f32>,
        lse: &mut Vec<f32>,
    ) -> Result<()> {
        let tokens = layout.positions.len();
        out.resize(tokens * heads.query_width(), 0.0);
        lse.resize(tokens * heads.queries, 0.0);
        attention::forward(qkv, &layout.families, heads, out, lse);
        Ok(())
    }

    fn attention_back(
        &self,
        qkv: &Vec<f32>,
        out: &Vec<f32>,
        lse: &Vec<f32>,
        grad: &Vec<f32>,
        layout: &Layout,
        heads: &Heads,
        d_qkv: &mut Vec<f32>,
    ) -> Result<()> {
        d_qkv.resize(qkv.len(), 0.0);
        attention::backward(Saved { qkv, out, lse, grad }, &layout.families, heads, d_qkv);
        Ok(())
    }

    fn project(&self, x: &Vec<f32>, w: &PackedProjection, out: &mut Vec<f32>) -> Result<()> {
        w.apply(x, out);
        Ok(())
    }

    fn project_onto(&self, x: &Vec<f32>, w: &PackedProjection, room: &mut Vec<f32>, onto: &mut Vec<f32>) -> Result<()> {
        w.apply(x, room);
        add(onto, room);
        Ok(())
    }

    fn weight_gradients(
        &self,
        rows: usize,
        sums: &[Sum<'_>],
        grad: &Vec<f32>,
        input: &Vec<f32>,
        (packed, _): &mut (Packed, Packed),
    ) -> Result<()> {
        let grad = View::new(grad, rows, grad.len() / rows.max(1));
        let input = View::new(input, rows, input.len() / rows.max(1));
        let mut at = 0;
        for (index, Sum { projection, weight, bias }) in sums.iter().enumerate() {
            let columns = grad.columns(at..at + projection.weight.dim(0)?);
            at += columns.shape().1;
            with_floats_mut(weight, |sum| {
                if projection.turned {
                    packed.fill(&[columns], true);
                    gemm::gemm(input.t(), packed, sum, true);
                } else {
                    if index == 0 {
                        packed.fill(&[input], true);
                    }
                    gemm::gemm(columns.t(), packed, sum, true);
                }
                Ok(())
            })?;
            if let Some(bias) = bias {
                with_floats_mut(bias, |sum| {
                    for row in 0..rows {
                        for (sum, x) in sum.iter_mut().zip(columns.row(row)) {
                            *sum += x;
                        }
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    fn input_gradients(
        &self,
        parts: &[&Projection],
        grad: &Vec<f32>,
        out: &mut Vec<f32>,
        (_, packed): &mut (Packed, Packed),
    ) -> Result<()> {
        let width = parts.iter().map(|p| p.weight.dim(0)).sum::<Result<usize>>()?;
        let grad = View::new(grad, grad.len() / width, width);
        let mut at = 0;
        for (index, projection) in parts.iter().enumerate() {
            let (outputs, inputs) = projection.weight.dims2()?;
            pack_into(packed, &[&projection.weight], false)?;
            out.resize(grad.shape().0 * inputs, 0.0);
            gemm::gemm(grad.columns(at..at + outputs), packed, out, index > 0);
            at += outputs;
        }
        Ok(())
    }

    fn gather(&self, x: &Vec<f32>, width: usize, rows: &[u32], out: &mut Vec<f32>) -> Result<()> {
        gather(View::new(x, x.len() / width, width), rows.iter().map(|&r| r as usize), out);
        Ok(())
    }

    fn scatter(&self, x: &Vec<f32>, width: usize, rows: &[u32], tokens: usize, out: &mut Vec<f32>) -> Result<()> {
        self.zero(out, tokens * width)?;
        for (&row, x) in rows.iter().zip(x.chunks_exact(width)) {
            let at = row as usize * width;
            for (sum, x) in out[at..at + width].iter_mut().zip(x) {
                *sum += x;
            }
        }
        Ok(())
    }

    fn answer(&self, hidden: &Vec<f32>, head: &Tensor, question: Question<'_>) -> Result<Answers<Vec<LogSum>>> {
        let (output, lse) = match head.dtype() {
            DType::BF16 => with_views::<bf16, _>(&[head], |w| Ok(self.ask(hidden, w[0], &question)))?,
            _ => with_views::<f32, _>(&[head], |w| Ok(self.ask(hidden, w[0], &question)))?,
        };
        Ok(Answers { output: Tensor::new(output, &Device::Cpu)?, lse })
    }

    fn answer_back(
        &self,
        hidden: &Vec<f32>,
        head: &Tensor,
        question: Question<'_>,
        answers: &Answers<Vec<LogSum>>,
        grad: &Tensor,
        d_hidden: &mut Vec<f32>,
        sum: &Tensor,
    ) -> Result<()> {
        let (grad, output) = (as_floats(grad)?, as_floats(&answers.output)?);
        let scored = question.targets.len();
        let (grad, d_entropy) = grad.split_at(scored);
        let entropy = question.entropy.then(|| (&output[scored..], d_entropy));
        let saved = head::Saved { hidden, lse: &answers.lse, grad, entropy };
        *d_hidden = with_floats_mut(sum, |sum| {
            with_views::<f32, _>(&[head], |w| Ok(head::backward(&saved, w[0], targets(&question), sum, self.0)))
        })?;
        Ok(())
    }

    fn scores(&self, hidden: &Vec<f32>, weight: &Tensor) -> Result<Tensor> {
        let weight = as_floats(&weight.flatten_all()?)?;
        let scores: Vec<f32> = hidden.chunks_exact(weight.len()).map(|row| dot(row, &weight)).collect();
        Tensor::new(scores, &Device::Cpu)
    }

    fn scores_back(
        &self,
        hidden: &Vec<f32>,
        weight: &Tensor,
        grad: &Tensor,
        d_hidden: &mut Vec<f32>,
        sum: &Tensor,
    ) -> Result<()> {
        let (weight, grad) = (as_floats(&weight.flatten_all()?)?, as_floats(grad)?);
        d_hidden.resize(hidden.len(), 0.0);
        with_floats_mut(sum, |d_weight| {
            let rows = hidden.chunks_exact(weight.len()).zip(d_hidden.chunks_exact_mut(weight.len()));
            for ((hidden, d_hidden), &grad) in rows.zip(&grad) {
                for i in 0..weight.len() {
                    d_hidden[i] = grad * weight[i];
                    d_weight[i] = grad.mul_add(hidden[i], d_weight[i]);
                }
            }
            Ok(())
        })
    }
}
