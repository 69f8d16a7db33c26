//! Simple operations on rows: sums, gathering, lookup.

use candle_core::{DType, Result, Tensor, WithDType};
use half::bf16;
use rehearsal_kernels::gemm::{Element, View};
use rehearsal_kernels::team::{chunk, for_each_chunk, share};

use super::weights::with_views;

/// Elements per task, at most.
pub const CHUNK: usize = 16 * 1024;

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    let size = share(x.len(), CHUNK);
    for_each_chunk(x, size, |i, x| {
        for (x, y) in x.iter_mut().zip(chunk(y, size, i)) {
            *x += y;
        }
    });
}

/// Copies rows of a matrix to `out`, as f32.
pub fn gather<E: Element>(matrix: View<'_, E>, rows: impl ExactSizeIterator<Item = usize>, out: &mut Vec<f32>) {
    let width = matrix.shape().1;
    out.resize(rows.len() * width, 0.0);
    for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
        E::copy(matrix.row(row), out);
    }
}

/// Copies rows of a table to `out`, as f32.
pub fn lookup(table: &Tensor, rows: &[u32], out: &mut Vec<f32>) -> Result<()> {
    fn typed<E: Element + WithDType>(table: &Tensor, rows: &[u32], out: &mut Vec<f32>) -> Result<()> {
        with_views::<E, _>(&[table], |t| {
            gather(t[0], rows.iter().map(|&r| r as usize), out);
            Ok(())
        })
    }
    match table.dtype() {
        DType::BF16 => typed::<bf16>(table, rows, out),
        _ => typed::<f32>(table, rows, out),
    }
}
