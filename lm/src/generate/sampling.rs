//! Sampling of the next token: temperature, top-k, top-p and min-p, in the order of `transformers`.

use rehearsal_kernels::math::{SUM_BLOCK, block_sums, exp_all, log_sum_exp, max};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Scratch buffers of [`Sampling::draw`].
#[derive(Default)]
pub struct Scratch {
    p: Vec<f32>,
    sums: Vec<f64>,
}

/// Sampling settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy decoding.
    pub temperature: f64,
    /// Keeps the `k` most probable tokens, and all that tie with the last of them; 0 keeps all tokens.
    pub top_k: usize,
    /// Keeps the nucleus: the most probable tokens that together reach this probability; 1 keeps all tokens.
    pub top_p: f64,
    /// Keeps tokens of at least this times the highest probability; 0 keeps all tokens.
    pub min_p: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl Sampling {
    /// Checks the ranges. The error names the setting and its value.
    pub fn validate(&self) -> Result<()> {
        let wrong =
            |name: &str, value: f64, range: &str| Err(Error::Sampling(format!("{name} = {value} must be {range}")));
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong("temperature", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return wrong("top_p", self.top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return wrong("min_p", self.min_p, "from 0 to 1");
        }
        Ok(())
    }

    /// Temperature of the reported log-probabilities: that of sampling, or 1 for greedy decoding.
    pub fn logprob_temperature(&self) -> f64 {
        if self.temperature == 0.0 { 1.0 } else { self.temperature }
    }

    /// Probabilities `[vocab]` after all filters; 0 for a token that was dropped.
    pub fn distribution(&self, logits: &[f32]) -> Vec<f32> {
        let mut p = Vec::new();
        self.fill(logits, &[], &mut p);
        p
    }

    /// Samples a token that is not `banned`, with the uniform number `u` in `[0, 1)`; `scratch` is reused between
    /// calls.
    pub fn draw(&self, logits: &[f32], banned: &[u32], u: f64, scratch: &mut Scratch) -> u32 {
        if self.temperature == 0.0 && banned.is_empty() {
            return argmax(logits);
        }
        let Scratch { p, sums } = scratch;
        self.fill(logits, banned, p);
        block_sums(p, sums);
        let mut left = u * sums.iter().sum::<f64>();
        // Find the block where the cumulative probability exceeds `left`; with rounding, that may be past the last one.
        let mut block = 0;
        while block + 1 < sums.len() && left >= sums[block] {
            left -= sums[block];
            block += 1;
        }
        let mut last = None;
        for (i, &x) in p[block * SUM_BLOCK..].iter().enumerate() {
            if x > 0.0 {
                last = Some(block * SUM_BLOCK + i);
                left -= x as f64;
                if left < 0.0 {
                    break;
                }
            }
        }
        last.or_else(|| p.iter().rposition(|&x| x > 0.0)).unwrap_or(0) as u32
    }

    fn fill(&self, logits: &[f32], banned: &[u32], p: &mut Vec<f32>) {
        p.clear();
        p.extend_from_slice(logits);
        for &token in banned {
            if let Some(x) = p.get_mut(token as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
        if self.temperature == 0.0 {
            let top = argmax(p) as usize;
            p.fill(0.0);
            p[top] = 1.0;
            return;
        }
        let scale = 1.0 / self.temperature as f32;
        if self.top_k > 0 && self.top_k < p.len() {
            let mut sorted = p.clone();
            let (_, &mut threshold, _) = sorted.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a));
            drop_where(p, |x| x < threshold);
        }
        normalise(p, scale);
        if self.top_p < 1.0 {
            keep_nucleus(p, self.top_p);
            rescale(p);
        }
        if self.min_p > 0.0 {
            let threshold = max(p) * self.min_p as f32;
            for x in p.iter_mut().filter(|x| **x < threshold) {
                *x = 0.0;
            }
            rescale(p);
        }
    }
}

fn drop_where(p: &mut [f32], drop: impl Fn(f32) -> bool) {
    for x in p.iter_mut().filter(|x| drop(**x)) {
        *x = f32::NEG_INFINITY;
    }
}

/// Drops every token that, together with all less probable ones, has at most `1 - top_p` of the probability.
fn keep_nucleus(p: &mut [f32], top_p: f64) {
    let wanted = p.iter().map(|&x| x as f64).sum::<f64>() - (1.0 - top_p);
    let by_probability = |&a: &u32, &b: &u32| p[b as usize].total_cmp(&p[a as usize]).then(b.cmp(&a));
    // Sort only the tokens that can be in the nucleus; sort all if, by rounding, these are too few.
    let mut least = nucleus_bound(p, wanted);
    let (order, kept) = loop {
        let mut order: Vec<u32> = (0..p.len() as u32).filter(|&i| p[i as usize] >= least).collect();
        order.sort_unstable_by(by_probability);
        let mut above = 0.0;
        let kept = order.iter().take_while(|&&i| {
            let keep = above < wanted || above == 0.0;
            above += p[i as usize] as f64;
            keep
        });
        let kept = kept.count();
        if kept < order.len() || least == 0.0 {
            break (order, kept);
        }
        least = 0.0;
    };
    // Of the tokens that tie with the last one kept, those earlier in the vocabulary are dropped.
    for &i in &order[kept..] {
        p[i as usize] = 0.0;
    }
    for x in p.iter_mut().filter(|x| **x < least) {
        *x = 0.0;
    }
}

/// Lower bound on the probabilities of the nucleus. Probabilities are summed by bucket from the largest down; the bound
/// is the lower end of the bucket below the one in which the sum exceeds `wanted`.
fn nucleus_bound(p: &[f32], wanted: f64) -> f32 {
    // A bucket is an exponent and three bits of mantissa; probabilities lie between 0 and slightly above 1.
    const SHIFT: u32 = 20;
    let bucket = |x: f32| (x.to_bits() >> SHIFT) as usize;
    let mut sums = [0.0f64; 1 << 11];
    for &x in p {
        sums[bucket(x) & 0x7ff] += x as f64;
    }
    let mut above = 0.0;
    for (bucket, sum) in sums.iter().enumerate().rev() {
        above += sum;
        if above > wanted {
            return f32::from_bits((bucket.saturating_sub(1) as u32) << SHIFT);
        }
    }
    0.0
}

fn normalise(p: &mut [f32], scale: f32) {
    let lse = log_sum_exp(p, scale);
    exp_all(p, scale, lse.high);
}

fn rescale(p: &mut [f32]) {
    let total: f64 = p.iter().map(|&x| x as f64).sum();
    for x in p {
        *x = (*x as f64 / total) as f32;
    }
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_distribution() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let sampling = Sampling::default();
        let stream = rehearsal_kernels::random::Stream::new(1, 1);
        let mut counts = [0; 4];
        for i in 0..20_000 {
            counts[sampling.draw(&logits, &[], stream.uniform(i), &mut Scratch::default()) as usize] += 1;
        }
        for (count, p) in counts.iter().zip([0.5, 0.3, 0.15, 0.05]) {
            assert!((*count as f64 / 20_000.0 - p).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn filters_drop_the_tail_and_zero_temperature_takes_the_top() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let kept = |s: Sampling| s.distribution(&logits).iter().filter(|&&p| p > 0.0).count();
        assert_eq!(kept(Sampling { top_k: 2, ..Default::default() }), 2);
        assert_eq!(kept(Sampling { top_p: 0.65, ..Default::default() }), 2);
        assert_eq!(kept(Sampling { min_p: 0.6, ..Default::default() }), 2);
        assert_eq!(kept(Sampling { temperature: 0.0, ..Default::default() }), 1);
    }

    #[test]
    fn the_nucleus_is_that_of_the_definition() {
        let stream = rehearsal_kernels::random::Stream::new(2, 2);
        for (n, spread, top_p) in [(3000, 2.0, 0.9), (3000, 0.1, 0.9), (500, 6.0, 0.3), (70, 1.0, 0.999)] {
            let logits: Vec<f32> = (0..n).map(|i| (stream.normal(i) * spread) as f32).collect();
            let whole = Sampling::default().distribution(&logits);
            let kept = Sampling { top_p, ..Default::default() }.distribution(&logits);
            for (i, &p) in kept.iter().enumerate() {
                let up_to: f64 = whole.iter().filter(|&&q| q <= whole[i]).map(|&q| q as f64).sum();
                assert_eq!(p > 0.0, up_to > 1.0 - top_p, "token {i} of {n}, {up_to}");
            }
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let error = Sampling { top_p: 0.0, ..Default::default() }.validate().unwrap_err().to_string();
        assert!(error.contains("top_p = 0"), "{error}");
        assert!(Sampling { temperature: f64::NAN, ..Default::default() }.validate().is_err());
    }
}

#[cfg(test)]
mod properties {
    use proptest::prelude::*;

    use super::*;

    /// The filters as `transformers` defines them, token by token and in f64.
    fn plainly(s: &Sampling, logits: &[f32]) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(b.cmp(a)));
        let softmax = |kept: &dyn Fn(usize) -> bool| -> Vec<f64> {
            let top = f64::from(logits[order[0]]);
            let e = |i: usize| if kept(i) { ((f64::from(logits[i]) - top) / s.temperature).exp() } else { 0.0 };
            let sum: f64 = (0..logits.len()).map(e).sum();
            (0..logits.len()).map(|i| e(i) / sum).collect()
        };
        let threshold = match s.top_k {
            0 => f32::NEG_INFINITY,
            k => logits[order[k.min(order.len()) - 1]],
        };
        let p = softmax(&|i| logits[i] >= threshold);
        let mut in_nucleus = vec![s.top_p >= 1.0; logits.len()];
        let mut above = 0.0;
        for &i in &order {
            if above < s.top_p {
                in_nucleus[i] = true;
            }
            above += p[i];
        }
        let p = softmax(&|i| logits[i] >= threshold && in_nucleus[i]);
        let least = p.iter().copied().fold(0.0, f64::max) * s.min_p;
        softmax(&|i| logits[i] >= threshold && in_nucleus[i] && p[i] >= least)
    }

    /// Logits that differ by enough that no filter's threshold falls between two by rounding.
    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let grid = proptest::collection::hash_set(-60i32..60, 2..40);
        grid.prop_map(|set| set.into_iter().map(|n| n as f32 / 8.0).collect())
    }

    fn sampling() -> impl Strategy<Value = Sampling> {
        let (top_p, min_p) = (prop_oneof![Just(1.0), 0.05f64..0.999], prop_oneof![Just(0.0), 0.01f64..0.5]);
        (0.3f64..3.0, 0usize..45, top_p, min_p).prop_map(|(temperature, top_k, top_p, min_p)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
        })
    }

    proptest! {
        #[test]
        fn filters_keep_what_their_definitions_keep(sampling in sampling(), logits in logits()) {
            let (p, wanted) = (sampling.distribution(&logits), plainly(&sampling, &logits));
            let total: f64 = p.iter().map(|p| f64::from(*p)).sum();
            prop_assert!((total - 1.0).abs() < 1e-5, "{total}");
            for (i, (p, wanted)) in p.iter().zip(&wanted).enumerate() {
                // Where the sum is within rounding of a threshold, one token more or less is kept.
                prop_assert!((f64::from(*p) - wanted).abs() < 1e-4, "token {i}: {p} and {wanted}");
            }
        }

        #[test]
        fn only_what_is_kept_and_not_banned_is_drawn(
            sampling in sampling(),
            logits in logits(),
            banned in proptest::collection::vec(0u32..40, 0..3),
            u in 0.0f64..1.0,
        ) {
            prop_assume!(banned.len() < logits.len());
            let token = sampling.draw(&logits, &banned, u, &mut Scratch::default());
            prop_assert!((token as usize) < logits.len() && !banned.contains(&token));
            if banned.is_empty() {
                prop_assert!(sampling.distribution(&logits)[token as usize] > 0.0);
            }
        }
    }
}
