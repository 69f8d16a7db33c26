//! SwiGLU (Shazeer 2020): `silu(gate) * up`, with a row's gates and ups side by side, `[rows, 2 * width]`.

use rayon::prelude::*;

use super::isa::per_isa;
use super::math::sigmoid;

/// Rows a task takes at a time.
const ROWS: usize = 16;

/// `out` `[rows, width]` from `gate_up` `[rows, 2 * width]`.
pub fn swiglu(gate_up: &[f32], width: usize, out: &mut [f32]) {
    out.par_chunks_mut(ROWS * width)
        .zip(gate_up.par_chunks(2 * ROWS * width))
        .for_each(|(out, gate_up)| forward(gate_up, width, out));
}

/// Turns `gate_up` into its own gradient, given that of the result.
pub fn swiglu_backward(gate_up: &mut [f32], width: usize, grad: &[f32]) {
    gate_up
        .par_chunks_mut(2 * ROWS * width)
        .zip(grad.par_chunks(ROWS * width))
        .for_each(|(gate_up, grad)| backward(gate_up, width, grad));
}

per_isa! {
    fn forward(gate_up: &[f32], width: usize, out: &mut [f32]) {
        for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
            let (gate, up) = row.split_at(width);
            for i in 0..width {
                out[i] = gate[i] * sigmoid(gate[i]) * up[i];
            }
        }
    }
}

per_isa! {
    fn backward(gate_up: &mut [f32], width: usize, grad: &[f32]) {
        for (row, grad) in gate_up.chunks_exact_mut(2 * width).zip(grad.chunks_exact(width)) {
            let (gate, up) = row.split_at_mut(width);
            for i in 0..width {
                let (g, u) = (gate[i], up[i]);
                let s = sigmoid(g);
                gate[i] = grad[i] * u * s * (1.0 + g * (1.0 - s));
                up[i] = grad[i] * g * s;
            }
        }
    }
}
