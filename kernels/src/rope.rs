//! Rotary position embeddings (Su et al. 2021) in the layout of Hugging Face: element `i` of a head is rotated with element
//! `i + dim / 2`.

use crate::isa::per_isa;
use crate::team::{chunk, for_each_chunk, share};

/// Rows per task, at most.
const ROWS: usize = 32;

/// Cosines and sines of the rotation at each position, `[positions, head_dim / 2]` each.
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    /// The table for `positions` positions. `inverse_frequencies` has one entry per pair of elements of a head. The angle, an
    /// inverse frequency times a position, is computed in f32 as in `transformers`.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let angle = |i: usize| (i / half) as f32 * inverse_frequencies[i % half];
        let cos = (0..positions * half).map(|i| (angle(i) as f64).cos() as f32).collect();
        let sin = (0..positions * half).map(|i| (angle(i) as f64).sin() as f32).collect();
        Self { cos, sin, half }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Cosines and sines of all positions.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Cosines and sines of one position.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Rotates the heads in the first `columns` columns of each row of `x` by the row's position, or, if `back` is set, by the
/// negated angle, as the backward pass needs.
pub fn rotate(x: &mut [f32], columns: usize, angles: &Angles, positions: &[u32], back: bool) {
    if positions.is_empty() {
        return;
    }
    let width = x.len() / positions.len();
    let n = share(positions.len(), ROWS);
    for_each_chunk(x, n * width, |i, x| rows(x, columns, angles, chunk(positions, n, i), back));
}

per_isa! {
    fn rows(x: &mut [f32], columns: usize, angles: &Angles, positions: &[u32], back: bool) {
        let half = angles.half;
        let width = x.len() / positions.len();
        let sign = if back { -1.0 } else { 1.0 };
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let (cos, sin) = angles.at(position as usize);
            for head in row[..columns].chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for i in 0..half {
                    let (s, c) = (sign * sin[i], cos[i]);
                    let (x, y) = (a[i], b[i]);
                    a[i] = x * c - y * s;
                    b[i] = y * c + x * s;
                }
            }
        }
    }
}
