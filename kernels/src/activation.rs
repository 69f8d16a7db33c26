//! Activations of an MLP: SwiGLU and GeGLU (Shazeer 2020), `act(gate) * up`, of rows that hold `gate` and `up` side by
//! side, `[rows, 2 * width]`; or SiLU and GELU of one projection, `[rows, width]`.

use crate::isa::per_isa;
use crate::math::{sigmoid, tanh};
use crate::team::{chunk, for_each_chunk, share};

/// Activation of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// SiLU: `x · σ(x)`.
    Silu,
    /// GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
}

/// Rows per task, at most.
const ROWS: usize = 16;

/// `√(2/π)` and the cubic term of GELU's tanh approximation (Hendrycks & Gimpel 2016).
const ROOT: f32 = 0.797_884_6;
const CUBE: f32 = 0.044_715;

/// Computes `out`, `[rows, width]`, from `input`, which is `[rows, 2 * width]` if gated, else `[rows, width]`.
pub fn forward(activation: Activation, gated: bool, width: usize, input: &[f32], out: &mut [f32]) {
    let wide = if gated { 2 * width } else { width };
    let run = match (activation, gated) {
        (Activation::Silu, true) => swiglu,
        (Activation::GeluTanh, true) => geglu,
        (Activation::Silu, false) => silu_row,
        (Activation::GeluTanh, false) => gelu_row,
    };
    let rows = share(out.len() / width.max(1), ROWS);
    for_each_chunk(out, rows * width, |i, out| run(chunk(input, rows * wide, i), width, out));
}

/// Replaces `input` by its gradient, given `grad`, `[rows, width]`, the gradient of the output.
pub fn backward(activation: Activation, gated: bool, width: usize, input: &mut [f32], grad: &[f32]) {
    let wide = if gated { 2 * width } else { width };
    let run = match (activation, gated) {
        (Activation::Silu, true) => swiglu_backward,
        (Activation::GeluTanh, true) => geglu_backward,
        (Activation::Silu, false) => silu_backward,
        (Activation::GeluTanh, false) => gelu_backward,
    };
    let rows = share(grad.len() / width.max(1), ROWS);
    for_each_chunk(input, rows * wide, |i, input| run(input, width, chunk(grad, rows * width, i)));
}

/// Value and derivative of SiLU.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// Value and derivative of GELU by its tanh approximation.
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let t = tanh(ROOT * x * (CUBE * x).mul_add(x, 1.0));
    let slope = ROOT * (3.0 * CUBE * x).mul_add(x, 1.0);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
}

/// Forward and backward kernels of one activation, gated and not.
macro_rules! kernels {
    ($act:ident, $gated:ident, $gated_backward:ident, $row:ident, $row_backward:ident) => {
        per_isa! {
            fn $gated(gate_up: &[f32], width: usize, out: &mut [f32]) {
                for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
                    let (gate, up) = row.split_at(width);
                    for i in 0..width {
                        out[i] = $act(gate[i]).0 * up[i];
                    }
                }
            }
        }
        per_isa! {
            fn $gated_backward(gate_up: &mut [f32], width: usize, grad: &[f32]) {
                for (row, grad) in gate_up.chunks_exact_mut(2 * width).zip(grad.chunks_exact(width)) {
                    let (gate, up) = row.split_at_mut(width);
                    for i in 0..width {
                        let (value, slope) = $act(gate[i]);
                        gate[i] = grad[i] * up[i] * slope;
                        up[i] = grad[i] * value;
                    }
                }
            }
        }
        per_isa! {
            fn $row(x: &[f32], _width: usize, out: &mut [f32]) {
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = $act(x).0;
                }
            }
        }
        per_isa! {
            fn $row_backward(x: &mut [f32], _width: usize, grad: &[f32]) {
                for (x, grad) in x.iter_mut().zip(grad) {
                    *x = grad * $act(*x).1;
                }
            }
        }
    };
}
kernels!(silu, swiglu, swiglu_backward, silu_row, silu_backward);
kernels!(gelu, geglu, geglu_backward, gelu_row, gelu_backward);
