//! SwiGLU (Shazeer 2020): `silu(gate) * up`, element by element.

use rayon::prelude::*;

use super::isa::per_isa;
use super::math::sigmoid;

/// Elements a task takes at a time.
const BLOCK: usize = 16 * 1024;

/// `out = silu(gate) * up`.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    out.par_chunks_mut(BLOCK)
        .zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)))
        .for_each(|(out, (gate, up))| forward(gate, up, out));
}

/// Gradients with respect to `gate` and `up`.
pub fn swiglu_backward(gate: &[f32], up: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut d_gate, mut d_up) = (vec![0.0; gate.len()], vec![0.0; up.len()]);
    d_gate
        .par_chunks_mut(BLOCK)
        .zip(d_up.par_chunks_mut(BLOCK))
        .zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)))
        .zip(grad.par_chunks(BLOCK))
        .for_each(|(((d_gate, d_up), (gate, up)), grad)| backward(gate, up, grad, d_gate, d_up));
    (d_gate, d_up)
}

per_isa! {
    fn forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for i in 0..out.len() {
            out[i] = gate[i] * sigmoid(gate[i]) * up[i];
        }
    }
}

per_isa! {
    fn backward(gate: &[f32], up: &[f32], grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        for i in 0..grad.len() {
            let s = sigmoid(gate[i]);
            d_gate[i] = grad[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
            d_up[i] = grad[i] * gate[i] * s;
        }
    }
}
