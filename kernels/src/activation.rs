//! What stands between the products of an MLP: SwiGLU and GeGLU (Shazeer 2020), `act(gate) * up` with a row's gates and
//! ups side by side, `[rows, 2 * width]`; or SiLU and GELU of one projection, `[rows, width]`.

use super::isa::per_isa;
use super::math::{sigmoid, tanh};
use super::team::{chunk, for_each_chunk, share};
use crate::model::Activation;

/// Rows a task takes at a time, at most.
const ROWS: usize = 16;

/// `√(2/π)` and the cubic term of GELU's tanh approximation (Hendrycks & Gimpel 2016).
const ROOT: f32 = 0.797_884_6;
const CUBE: f32 = 0.044_715;

/// `out` `[rows, width]` from `input`, which is twice as wide if it is gated.
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

/// Turns `input` into its own gradient, given that of the result.
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

/// SiLU and its derivative.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// GELU by its tanh approximation, and its derivative.
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let t = tanh(ROOT * x * (CUBE * x).mul_add(x, 1.0));
    let slope = ROOT * (3.0 * CUBE * x).mul_add(x, 1.0);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
}

/// The kernels of one activation.
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
