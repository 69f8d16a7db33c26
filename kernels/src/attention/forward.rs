//! The forward pass of attention over packed families.

use std::ops::Range;

use super::family::Family;
use super::heads::{Heads, softmax};
use super::scratch::{BLOCK, Scratch, blocks, columns, for_each_task, rows};
use crate::gemm::{View, gemm_serial, gemm_shared};
use crate::isa::per_isa;
use crate::shared::Shared;

/// Computes the attention output `out`, `[tokens, queries * dim]`, and `lse`, `[tokens, queries]`, the log-sum-exp of each
/// row's scores, which the backward pass reads. `qkv` is `[tokens, heads.width()]`: queries, keys and values side by side.
pub fn forward(qkv: &[f32], families: &[Family], heads: &Heads, out: &mut [f32], lse: &mut [f32]) {
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    for_each_task(families, heads, |family, head, scratch| {
        for (before, part) in family.parts() {
            // SAFETY: only this task writes the family's rows in these heads' columns.
            unsafe { forward_part(qkv, &before, &part, head, heads, out, lse, scratch) };
        }
    });
}

/// # Safety
/// The rows of `part`, in the columns of the heads that share key head `head`, belong to the caller.
#[allow(clippy::too_many_arguments)]
unsafe fn forward_part(
    qkv: &[f32],
    before: &Range<usize>,
    part: &Range<usize>,
    head: usize,
    heads: &Heads,
    out: Shared<'_>,
    lse: Shared<'_>,
    scratch: &mut Scratch,
) {
    let (d, width, out_width) = (heads.dim, heads.width(), heads.query_width());
    let (key_at, value_at) = columns(head, heads);
    let own = |at: usize| rows(qkv, width, part, at, d);
    scratch.keys_t.set(before.len(), own(key_at).t());
    scratch.values.set(before.len(), own(value_at));
    let (past_keys, own_keys) = scratch.keys_t.get(before.len());
    let (past_values, own_values) = scratch.values.get(before.len());
    for block in blocks(part) {
        let (n, seen) = (block.len(), block.end - part.start);
        let stride = before.len() + seen;
        scratch.scores.resize(n * stride, 0.0);
        let scores = &mut scratch.scores[..n * stride];
        for query in head * heads.group()..(head + 1) * heads.group() {
            let q = rows(qkv, width, &block, query * d, d);
            if let Some(past) = past_keys {
                gemm_serial(q, past, scores, stride, false);
            }
            gemm_serial(q, own_keys.leading(d, seen), &mut scores[before.len()..], stride, false);
            let mut totals = [0.0; BLOCK];
            for (i, row) in scores.chunks_exact_mut(stride).enumerate() {
                let position = before.len() + block.start - part.start + i;
                let (top, total) = softmax_row(row, heads.first_key(position), position + 1, heads);
                totals[i] = 1.0 / total;
                // SAFETY: the caller's promise.
                let lse = unsafe { lse.slice((block.start + i) * heads.queries + query, 1) };
                lse[0] = top + total.ln();
            }
            let scores = View::new(scores, n, stride);
            let target = out.from(block.start * out_width + query * d);
            // SAFETY: the caller's promise.
            unsafe {
                if let Some(past) = past_values {
                    gemm_shared(scores.columns(0..before.len()), past, target, out_width, false);
                }
                let own = own_values.leading(seen, d);
                gemm_shared(scores.columns(before.len()..stride), own, target, out_width, past_values.is_some());
                for (i, &inverse) in totals[..n].iter().enumerate() {
                    for x in target.slice(i * out_width, d) {
                        *x *= inverse;
                    }
                }
            }
        }
    }
}

per_isa! {
    /// Unnormalised probabilities in `first..len`, zeros elsewhere.
    fn softmax_row(row: &mut [f32], first: usize, len: usize, heads: &Heads) -> (f32, f32) {
        row[..first].fill(0.0);
        row[len..].fill(0.0);
        softmax(&mut row[first..len], heads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{KEY_BLOCK, attend};
    use crate::random::Stream;

    fn random(n: usize, id: u64) -> Vec<f32> {
        let stream = Stream::new(5, id);
        (0..n as u64).map(|i| stream.normal(i) as f32).collect()
    }

    const HEADS: Heads = Heads { queries: 6, keys: 2, dim: 8, scale: 0.35, window: None, softcap: None };

    /// The rows of one completion with its prompt, as a sequence of their own.
    fn alone(qkv: &[f32], family: &Family, which: usize, width: usize) -> Vec<f32> {
        let of = |r: &Range<usize>| qkv[r.start * width..r.end * width].to_vec();
        [of(&family.prompt), of(&family.completions[which])].concat()
    }

    #[test]
    fn shared_prompts_and_the_cache_give_the_same_bits_as_sequences_alone() {
        for heads in [HEADS, Heads { window: Some(5), ..HEADS }, Heads { softcap: Some(2.0), ..HEADS }] {
            let (width, out_width) = (heads.width(), heads.query_width());
            let family = Family { prompt: 0..61, completions: vec![61..90, 90..91, 91..160] };
            let qkv = random(160 * width, 1);
            let (mut out, mut lse) = (vec![0.0; 160 * out_width], vec![0.0; 160 * heads.queries]);
            forward(&qkv, std::slice::from_ref(&family), &heads, &mut out, &mut lse);
            for (which, part) in family.completions.iter().enumerate() {
                let single = alone(&qkv, &family, which, width);
                let len = single.len() / width;
                let (mut got, mut l) = (vec![0.0; len * out_width], vec![0.0; len * heads.queries]);
                forward(&single, &[Family::alone(0..len)], &heads, &mut got, &mut l);
                let tail = &out[part.start * out_width..part.end * out_width];
                assert_eq!(got[61 * out_width..], *tail);
                // And a new row against a cache.
                let capacity = len.next_multiple_of(KEY_BLOCK);
                let (key, value) = columns(1, &heads);
                let mut keys = vec![0.0; heads.dim * capacity];
                let mut values = vec![0.0; capacity * heads.dim];
                for (t, row) in single.chunks(width).enumerate() {
                    for d in 0..heads.dim {
                        keys[(t / KEY_BLOCK * heads.dim + d) * KEY_BLOCK + t % KEY_BLOCK] = row[key + d];
                        values[t * heads.dim + d] = row[value + d];
                    }
                }
                let (mut scores, mut last) = (vec![0.0; capacity], vec![0.0; heads.dim]);
                let query = &single[(len - 1) * width + 4 * heads.dim..][..heads.dim];
                let first = heads.first_key(len - 1);
                let mut sum = [0.0];
                attend(query, &keys, &values, first, len, &heads, &[], &mut scores, &mut last, &mut sum);
                assert_eq!(last, got[(len - 1) * out_width + 4 * heads.dim..][..heads.dim]);
                assert_eq!(sum[0], l[(len - 1) * heads.queries + 4]);
            }
        }
    }
}
