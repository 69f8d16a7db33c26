//! Rotary positions (Su et al. 2021) in the layout of Hugging Face: element `i` of a head turns with `i + d/2`.

use super::isa::per_isa;
use super::team::{chunk, for_each_chunk, share};

/// Rows a task takes at a time, at most.
const ROWS: usize = 32;

/// Cosines and sines for every position, `[positions, head_dim / 2]` each.
pub struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    /// `inverse_frequencies` has one entry per pair of a head; angles are products in f32, as `transformers` has them.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let angle = |i: usize| (i / half) as f32 * inverse_frequencies[i % half];
        let cos = (0..positions * half).map(|i| (angle(i) as f64).cos() as f32).collect();
        let sin = (0..positions * half).map(|i| (angle(i) as f64).sin() as f32).collect();
        Self { cos, sin, half }
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// All cosines and sines.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Cosines and sines of one position.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Turns the heads in the first `turned` columns of every row of `x` by the row's position, or back.
pub fn rotate(x: &mut [f32], turned: usize, angles: &Angles, positions: &[u32], back: bool) {
    if positions.is_empty() {
        return;
    }
    let width = x.len() / positions.len();
    let n = share(positions.len(), ROWS);
    for_each_chunk(x, n * width, |i, x| rows(x, turned, angles, chunk(positions, n, i), back));
}

per_isa! {
    fn rows(x: &mut [f32], turned: usize, angles: &Angles, positions: &[u32], back: bool) {
        let half = angles.half;
        let width = x.len() / positions.len();
        let sign = if back { -1.0 } else { 1.0 };
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let (cos, sin) = angles.at(position as usize);
            for head in row[..turned].chunks_exact_mut(2 * half) {
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
