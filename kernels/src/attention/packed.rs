//! Attention over packed families: products of small matrices, one task for each family and key head.

use std::ops::Range;

use super::{Heads, softmax};
use crate::kernels::Shared;
use crate::kernels::gemm::{Packed, Precision, View, gemm_serial, gemm_shared};
use crate::kernels::isa::per_isa;
use crate::kernels::math::{bend, dot, exp_row};
use crate::kernels::team::{for_each, lend};

/// Queries whose scores exist at a time.
const BLOCK: usize = 48;

/// Where sequences that begin alike lie on the token axis: their prompt, computed once, and what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    pub prompt: Range<usize>,
    pub completions: Vec<Range<usize>>,
}

impl Family {
    /// A sequence that shares nothing.
    pub fn alone(tokens: Range<usize>) -> Self {
        Self { prompt: tokens.start..tokens.start, completions: std::iter::once(tokens).collect() }
    }

    /// Every part with the tokens that it sees before itself.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        let prompt = self.prompt.clone();
        std::iter::once((0..0, prompt.clone())).chain(self.completions.iter().map(move |c| (prompt.clone(), c.clone())))
    }
}

/// `x`'s rows, in columns `at .. at + dim`.
fn rows<'a>(x: &'a [f32], width: usize, rows: &Range<usize>, at: usize, dim: usize) -> View<'a> {
    View::new(&x[rows.start * width..rows.end * width], rows.len(), width).columns(at..at + dim)
}

/// Keys or values of a prompt and of one of its completions, as right-hand sides.
struct Sides {
    prompt: Packed,
    own: Packed,
}

impl Sides {
    fn empty() -> Self {
        Self { prompt: Packed::empty(Precision::F32), own: Packed::empty(Precision::F32) }
    }

    /// Packs the part that is being worked on; with nothing before it, it may be the past of others.
    fn set(&mut self, past: usize, matrix: View<'_>) {
        if past == 0 { &mut self.prompt } else { &mut self.own }.fill(&[matrix], false);
    }

    /// The past, if there is one, and the part that is being worked on.
    fn get(&self, past: usize) -> (Option<&Packed>, &Packed) {
        if past == 0 { (None, &self.prompt) } else { (Some(&self.prompt), &self.own) }
    }
}

/// What the tasks of one thread reuse.
struct Scratch {
    keys_t: Sides,
    values: Sides,
    keys: Sides,
    values_t: Sides,
    queries: Packed,
    grads: Packed,
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    d_keys: Vec<f32>,
    d_values: Vec<f32>,
}

impl Default for Scratch {
    fn default() -> Self {
        let sides = Sides::empty;
        let packed = || Packed::empty(Precision::F32);
        Self {
            keys_t: sides(),
            values: sides(),
            keys: sides(),
            values_t: sides(),
            queries: packed(),
            grads: packed(),
            scores: Vec::new(),
            d_scores: Vec::new(),
            d_keys: Vec::new(),
            d_values: Vec::new(),
        }
    }
}

/// Calls `work` for every family and key head: the unit of work between threads.
fn for_each_task(families: &[Family], heads: &Heads, work: impl Fn(&Family, usize, &mut Scratch) + Sync) {
    for_each(families.len() * heads.keys, |task| {
        let (family, head) = (task / heads.keys, task % heads.keys);
        lend!(Scratch, |scratch: &mut Scratch| work(&families[family], head, scratch));
    });
}

fn blocks(part: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = part.end;
    part.clone().step_by(BLOCK).map(move |start| start..(start + BLOCK).min(end))
}

/// `qkv` is `[tokens, heads.width()]`: queries, keys and values side by side. Fills `out` `[tokens, queries * dim]`
/// and, for the way back, the log-sum-exp of each row's scores, `[tokens, queries]`.
pub fn forward(qkv: &[f32], families: &[Family], heads: &Heads, out: &mut [f32], lse: &mut [f32]) {
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    for_each_task(families, heads, |family, head, scratch| {
        for (before, part) in family.parts() {
            // SAFETY: a task alone writes its family's rows in its heads' columns.
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

/// Columns of a key head's keys and values.
fn columns(head: usize, heads: &Heads) -> (usize, usize) {
    let key = heads.query_width() + head * heads.dim;
    (key, key + heads.key_width())
}

per_isa! {
    /// Unnormalised probabilities in `first..len`, zeros elsewhere.
    fn softmax_row(row: &mut [f32], first: usize, len: usize, heads: &Heads) -> (f32, f32) {
        row[..first].fill(0.0);
        row[len..].fill(0.0);
        softmax(&mut row[first..len], heads)
    }
}

per_isa! {
    /// Probabilities from scores (zeros outside `first..len`), and the scores' gradient from that of the
    /// probabilities in `ds`.
    fn softmax_backward(
        row: &mut [f32],
        ds: &mut [f32],
        first: usize,
        len: usize,
        heads: &Heads,
        lse: f32,
        grad: &[f32],
        out: &[f32],
    ) {
        for x in [&mut *row, &mut *ds] {
            x[..first].fill(0.0);
            x[len..].fill(0.0);
        }
        let (row, ds) = (&mut row[first..len], &mut ds[first..len]);
        let delta = dot(grad, out);
        match heads.softcap {
            None => {
                exp_row(row, heads.scale, lse);
                for (ds, &p) in ds.iter_mut().zip(row.iter()) {
                    *ds = p * (*ds - delta) * heads.scale;
                }
            }
            Some(cap) => {
                bend(row, heads.scale, cap);
                for (ds, &bent) in ds.iter_mut().zip(row.iter()) {
                    let t = bent / cap;
                    *ds = (*ds - delta) * heads.scale * (1.0 - t * t);
                }
                exp_row(row, 1.0, lse);
                for (ds, &p) in ds.iter_mut().zip(row.iter()) {
                    *ds *= p;
                }
            }
        }
    }
}

/// What the way back reads.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    pub qkv: &'a [f32],
    pub out: &'a [f32],
    pub lse: &'a [f32],
    /// Gradient of the output.
    pub grad: &'a [f32],
}

/// Fills `d_qkv`, the gradient with respect to `qkv`.
pub fn backward(saved: Saved<'_>, families: &[Family], heads: &Heads, d_qkv: &mut [f32]) {
    let d_qkv = Shared::new(d_qkv);
    for_each_task(families, heads, |family, head, scratch| {
        // SAFETY: a task alone writes its family's rows in its heads' columns.
        unsafe { backward_family(saved, family, head, heads, d_qkv, scratch) };
    });
}

/// # Safety
/// The family's rows, in the columns of the heads that share key head `head` and of its keys and values, belong to
/// the caller.
unsafe fn backward_family(
    saved: Saved<'_>,
    family: &Family,
    head: usize,
    heads: &Heads,
    d_qkv: Shared<'_>,
    scratch: &mut Scratch,
) {
    let (d, width) = (heads.dim, heads.width());
    let (key_at, value_at) = columns(head, heads);
    let longest = family.completions.iter().map(Range::len).max().unwrap_or(0);
    let past = family.prompt.len();
    for sums in [&mut scratch.d_keys, &mut scratch.d_values] {
        sums.clear();
        sums.resize((past + longest) * d, 0.0);
    }
    for (index, (before, part)) in family.parts().enumerate() {
        let own = |at: usize| rows(saved.qkv, width, &part, at, d);
        scratch.keys_t.set(before.len(), own(key_at).t());
        scratch.values_t.set(before.len(), own(value_at).t());
        scratch.keys.set(before.len(), own(key_at));
        for block in blocks(&part) {
            for query in head * heads.group()..(head + 1) * heads.group() {
                // SAFETY: the caller's promise.
                unsafe { backward_block(saved, &before, &part, &block, query, heads, d_qkv, scratch) };
            }
        }
        // The prompt's own sums go on growing until its last completion has added to them.
        if index > 0 {
            // SAFETY: the caller's promise.
            unsafe { store(scratch, past, &part, (key_at, value_at), heads, d_qkv) };
            scratch.d_keys[past * d..].fill(0.0);
            scratch.d_values[past * d..].fill(0.0);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(scratch, 0, &family.prompt, (key_at, value_at), heads, d_qkv) };
}

/// Writes the summed gradients of a part's keys and values, which begin at row `at` of the sums.
///
/// # Safety
/// The rows of `part` in those columns belong to the caller.
unsafe fn store(
    scratch: &Scratch,
    at: usize,
    part: &Range<usize>,
    (key_at, value_at): (usize, usize),
    heads: &Heads,
    d_qkv: Shared<'_>,
) {
    let (d, width) = (heads.dim, heads.width());
    for (i, row) in part.clone().enumerate() {
        let source = (at + i) * d..(at + i + 1) * d;
        // SAFETY: the caller's promise.
        unsafe {
            d_qkv.slice(row * width + key_at, d).copy_from_slice(&scratch.d_keys[source.clone()]);
            d_qkv.slice(row * width + value_at, d).copy_from_slice(&scratch.d_values[source]);
        }
    }
}

/// # Safety
/// The rows of `block`, in the columns of head `query`, belong to the caller.
#[allow(clippy::too_many_arguments)]
unsafe fn backward_block(
    saved: Saved<'_>,
    before: &Range<usize>,
    part: &Range<usize>,
    block: &Range<usize>,
    query: usize,
    heads: &Heads,
    d_qkv: Shared<'_>,
    scratch: &mut Scratch,
) {
    let (d, width, out_width) = (heads.dim, heads.width(), heads.query_width());
    let (n, past, seen) = (block.len(), before.len(), block.end - part.start);
    let stride = past + seen;
    let q = rows(saved.qkv, width, block, query * d, d);
    let grad = rows(saved.grad, out_width, block, query * d, d);
    let Scratch { keys_t, keys, values_t, queries, grads, scores, d_scores, d_keys, d_values, .. } = scratch;
    scores.resize(n * stride, 0.0);
    d_scores.resize(n * stride, 0.0);
    let (scores, d_scores) = (&mut scores[..n * stride], &mut d_scores[..n * stride]);
    for (x, sides, out) in [(q, &*keys_t, &mut *scores), (grad, &*values_t, &mut *d_scores)] {
        let (before, own) = sides.get(past);
        if let Some(before) = before {
            gemm_serial(x, before, out, stride, false);
        }
        gemm_serial(x, own.leading(d, seen), &mut out[past..], stride, false);
    }
    for (i, (row, ds)) in scores.chunks_exact_mut(stride).zip(d_scores.chunks_exact_mut(stride)).enumerate() {
        let (token, position) = (block.start + i, past + block.start - part.start + i);
        let at = token * out_width + query * d..token * out_width + (query + 1) * d;
        let lse = saved.lse[token * heads.queries + query];
        let (grad, out) = (&saved.grad[at.clone()], &saved.out[at]);
        softmax_backward(row, ds, heads.first_key(position), position + 1, heads, lse, grad, out);
    }
    let (scores, d_scores) = (View::new(scores, n, stride), View::new(d_scores, n, stride));
    let target = d_qkv.from(block.start * width + query * d);
    let (before, own) = keys.get(past);
    // SAFETY: the caller's promise.
    unsafe {
        if let Some(before) = before {
            gemm_shared(d_scores.columns(0..past), before, target, width, false);
        }
        gemm_shared(d_scores.columns(past..stride), own.leading(seen, d), target, width, past > 0);
    }
    queries.fill(&[q], false);
    grads.fill(&[grad], false);
    gemm_serial(d_scores.t(), &*queries, d_keys, d, true);
    gemm_serial(scores.t(), &*grads, d_values, d, true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::attention::{KEY_BLOCK, attend};
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
