//! Row arithmetic that kernels share: elementary functions, reductions over sixteen lanes, log-sum-exp.

/// Elements of a block of [`block_sums`].
pub const SUM_BLOCK: usize = 512;

/// Number of lanes of every row reduction, on every instruction set.
pub const LANES: usize = 16;

/// `exp(x)` in f32 to about 1 ulp, branch-free so that it vectorises; 0 below -87.3, +inf above 88.7.
///
/// Range reduction by ln 2 in two parts, then the degree-6 minimax polynomial of Cephes `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    let shifted = clamped.mul_add(LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, clamped));
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // 2^n as two factors, so that neither overflows at the ends of the range.
    let k = shifted.to_bits() as i32 - 12_582_912.0_f32.to_bits() as i32;
    let half = k >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let value = y * scale(half) * scale(k - half);
    if x.is_nan() {
        x
    } else if x < -87.336_54 {
        0.0
    } else if x > 88.722_83 {
        f32::INFINITY
    } else {
        value
    }
}

/// Logistic function `1 / (1 + exp(-x))`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let e = exp(-2.0 * x.abs());
    ((1.0 - e) / (1.0 + e)).copysign(x)
}

/// Softcap of scaled elements: `x = cap * tanh(x * scale / cap)`.
#[inline(always)]
pub fn softcap_scaled(row: &mut [f32], scale: f32, cap: f32) {
    for x in row {
        *x = cap * tanh(*x * (scale / cap));
    }
}

crate::isa::per_isa! {
    /// Softcap: `x = cap * tanh(x / cap)` (Gemma 2).
    pub fn softcap(row: &mut [f32], cap: f32) {
        softcap_scaled(row, 1.0, cap);
    }
}

/// Combines lanes in a fixed tree: (0, 8), (1, 9), …, then (0, 4), …, then (0, 2), (1, 3), then (0, 1).
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest element; negative infinity for an empty row.
#[inline(always)]
pub fn max(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (head, tail) = row.as_chunks::<LANES>();
    for chunk in head {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = if x > *lane { x } else { *lane };
    }
    fold(lanes, |a, b| if a > b { a } else { b })
}

/// Sums `f` over the elements at the same index of `K` rows of equal length, for `N` sums at once; index `i` goes to lane
/// `i % LANES`.
#[inline(always)]
pub fn sums<const K: usize, const N: usize>(rows: [&[f32]; K], f: impl Fn([f32; K]) -> [f32; N]) -> [f32; N] {
    let split = rows.map(|row| row.as_chunks::<LANES>());
    let mut lanes = [[0.0f32; LANES]; N];
    for block in 0..rows[0].len() / LANES {
        let blocks = split.map(|(blocks, _)| &blocks[block]);
        for lane in 0..LANES {
            let terms = f(blocks.map(|block| block[lane]));
            for n in 0..N {
                lanes[n][lane] += terms[n];
            }
        }
    }
    for lane in 0..rows[0].len() % LANES {
        let terms = f(split.map(|(_, rest)| rest[lane]));
        for n in 0..N {
            lanes[n][lane] += terms[n];
        }
    }
    lanes.map(|lanes| sum(&lanes))
}

/// Sum of a row, over sixteen lanes.
#[inline(always)]
pub fn sum(row: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (head, tail) = row.as_chunks::<LANES>();
    for chunk in head {
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += x;
    }
    fold(lanes, |a, b| a + b)
}

/// Dot product over sixteen lanes of fused multiply-adds.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut lanes = [0.0; LANES];
    let (a_head, a_tail) = a.as_chunks::<LANES>();
    let (b_head, b_tail) = b.as_chunks::<LANES>();
    for (x, y) in a_head.iter().zip(b_head) {
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(a_tail).zip(b_tail) {
        *lane = x.mul_add(y, *lane);
    }
    fold(lanes, |a, b| a + b)
}

/// `row[i] = exp(row[i] * scale - shift)`, and the sum of the results.
#[inline(always)]
pub fn exp_row(row: &mut [f32], scale: f32, shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (head, tail) = row.as_chunks_mut::<LANES>();
    for chunk in head {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i].mul_add(scale, -shift));
            lanes[i] += chunk[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *x = exp(x.mul_add(scale, -shift));
        *lane += *x;
    }
    fold(lanes, |a, b| a + b)
}

/// Columns of a block of [`LogSumExp`].
pub const LSE_BLOCK: usize = 4096;

/// Log-sum-exp of a row, computed block by block: the bits are the same whether the row exists whole or only in blocks of
/// [`LSE_BLOCK`] columns.
#[derive(Debug, Clone, Copy)]
pub struct LogSumExp {
    top: f32,
    total: f32,
}

impl Default for LogSumExp {
    fn default() -> Self {
        Self { top: f32::NEG_INFINITY, total: 0.0 }
    }
}

impl LogSumExp {
    /// Adds the next block of at most [`LSE_BLOCK`] columns, each times `scale`.
    pub fn add(&mut self, block: &[f32], scale: f32) {
        let (top, total) = block_log_sum_exp(block, scale);
        if top > self.top {
            self.total = if self.total == 0.0 { total } else { self.total.mul_add(exp(self.top - top), total) };
            self.top = top;
        } else if total > 0.0 {
            self.total += total * exp(top - self.top);
        }
    }

    /// The log-sum-exp of the blocks added so far.
    pub fn value(&self) -> LogSum {
        let log = self.total.ln();
        let high = self.top + log;
        let low = if high.abs() < EXACT_BELOW { 0.0 } else { log - (high - self.top) };
        LogSum { high, low: if low.is_finite() { low } else { 0.0 } }
    }
}

/// Below this, one f32 holds a log-sum-exp to 3e-5.
const EXACT_BELOW: f32 = 1024.0;

/// A log-sum-exp as the sum of two numbers: of large logits one f32 alone would lose digits of every log-probability.
/// `low` is 0 where `high` is below 1,024 in size, as in all but extreme models.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LogSum {
    /// The sum, rounded.
    pub high: f32,
    /// What rounding took away.
    pub low: f32,
}

crate::isa::per_isa! {
    /// The largest `x * scale` and the sum of `exp(x * scale - largest)`.
    fn block_log_sum_exp(row: &[f32], scale: f32) -> (f32, f32) {
        let top = max(row) * scale;
        if top == f32::NEG_INFINITY {
            return (top, 0.0);
        }
        let mut lanes = [0.0f32; LANES];
        let (head, tail) = row.as_chunks::<LANES>();
        for chunk in head {
            for i in 0..LANES {
                lanes[i] += exp(chunk[i].mul_add(scale, -top));
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(tail) {
            *lane += exp(x.mul_add(scale, -top));
        }
        (top, fold(lanes, |a, b| a + b))
    }
}

/// Log of the sum of exponentials of `row * scale`, without changing the row.
pub fn log_sum_exp(row: &[f32], scale: f32) -> LogSum {
    let mut sum = LogSumExp::default();
    for block in row.chunks(LSE_BLOCK) {
        sum.add(block, scale);
    }
    sum.value()
}

crate::isa::per_isa! {
    /// `row[i] = exp(row[i] * scale - shift)`.
    pub fn exp_all(row: &mut [f32], scale: f32, shift: f32) {
        exp_row(row, scale, shift);
    }
}

crate::isa::per_isa! {
    /// Sums of consecutive blocks of [`SUM_BLOCK`] elements, and of what is left.
    pub fn block_sums(row: &[f32], out: &mut Vec<f64>) {
        out.clear();
        out.extend(row.chunks(SUM_BLOCK).map(|block| sum(block) as f64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_the_f64_one() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = (x as f64).exp();
            let ulp = (want as f32).to_bits();
            let ulp = (f32::from_bits(ulp + 1) as f64 - f32::from_bits(ulp) as f64).abs();
            worst = worst.max((exp(x) as f64 - want).abs() / ulp);
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn exp_keeps_its_edges() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn log_sum_exp_does_not_overflow() {
        let row = [1000.0f32, 1000.0, -1000.0];
        assert!((log_sum_exp(&row, 1.0).high - (1000.0 + 2.0f32.ln())).abs() < 1e-3);
        let mut long: Vec<f32> = (0..3 * LSE_BLOCK + 7).map(|i| (i % 977) as f32 * 0.01).collect();
        long[..LSE_BLOCK].fill(f32::NEG_INFINITY);
        long[2 * LSE_BLOCK] = 500.0;
        let want = long.iter().map(|&x| (x as f64 - 500.0).exp()).sum::<f64>().ln() + 500.0;
        assert!((log_sum_exp(&long, 1.0).high as f64 - want).abs() < 1e-3);
    }

    #[test]
    fn the_low_part_of_a_log_sum_exp_holds_what_one_f32_cannot() {
        let row: Vec<f32> = (0..130).map(|i| 4000.0 + (i % 7) as f32 * 0.25).collect();
        let want = 4000.0 + row.iter().map(|&x| (f64::from(x) - 4000.0).exp()).sum::<f64>().ln();
        let LogSum { high, low } = log_sum_exp(&row, 1.0);
        assert!((f64::from(high) - want).abs() > 1e-5, "the example needs no low part");
        assert!((f64::from(high) + f64::from(low) - want).abs() < 2e-6);
        // Ordinary logits keep the bits that one number gave them.
        assert_eq!(log_sum_exp(&row, 0.25).low, 0.0);
    }
}
