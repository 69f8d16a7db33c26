//! Rotary position embeddings (Su et al. 2021) in the layout of Hugging Face: element `i` of a head is rotated with element
//! `i + dim / 2`.

use std::sync::OnceLock;

use crate::isa::per_isa;
use crate::team::{chunk, for_each_chunk, share};

/// Rows per task, at most.
const ROWS: usize = 32;

/// Positions whose angles are computed together, when the first of them is needed.
const BLOCK: usize = 1024;

/// Cosines and sines of the rotation at each position, `head_dim / 2` each. They are computed when they are needed: a model's
/// context may be far longer than its sequences.
pub struct Angles {
    inverse_frequencies: Vec<f32>,
    positions: usize,
    /// Cosines and sines of [`BLOCK`] positions.
    blocks: Vec<OnceLock<(Vec<f32>, Vec<f32>)>>,
}

impl Angles {
    /// The table for `positions` positions. `inverse_frequencies` has one entry per pair of elements of a head. The angle, an
    /// inverse frequency times a position, is computed in f32 as in `transformers`.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let blocks = (0..positions.div_ceil(BLOCK)).map(|_| OnceLock::new()).collect();
        Self { inverse_frequencies: inverse_frequencies.to_vec(), positions, blocks }
    }

    fn block(&self, block: usize) -> &(Vec<f32>, Vec<f32>) {
        self.blocks[block].get_or_init(|| {
            let positions = block * BLOCK..self.positions.min((block + 1) * BLOCK);
            let angles = positions.flat_map(|p| self.inverse_frequencies.iter().map(move |f| f64::from(p as f32 * f)));
            angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
        })
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Cosines and sines of all positions.
    pub fn tables(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for block in 0..self.blocks.len() {
            let (c, s) = self.block(block);
            cos.extend_from_slice(c);
            sin.extend_from_slice(s);
        }
        (cos, sin)
    }

    /// Cosines and sines of one position.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.inverse_frequencies.len();
        let (cos, sin) = self.block(position / BLOCK);
        let range = position % BLOCK * half..(position % BLOCK + 1) * half;
        (&cos[range.clone()], &sin[range])
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
        let half = angles.inverse_frequencies.len();
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
