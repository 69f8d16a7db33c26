//! Win rates: MT-bench's rule for two orders (Zheng et al. 2023), bootstrap intervals, and a length-controlled rate
//! like AlpacaEval 2's (Dubois et al. 2024).

use std::cmp::Ordering;

/// Combines the verdicts of both orders: equal ones stand, others are a tie. Verdicts are 1 (win), 0 (tie) or -1
/// (loss).
pub fn agree(first: i8, second: i8) -> i8 {
    if first == second { first } else { 0 }
}

/// Shares of wins, ties and losses.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WinRate {
    /// Share of wins, from 0 to 1.
    pub win: f64,
    /// Share of ties, from 0 to 1.
    pub tie: f64,
    /// Share of losses, from 0 to 1.
    pub loss: f64,
}

impl WinRate {
    /// Shares of verdicts of 1 (win), 0 (tie) and -1 (loss).
    pub fn of(verdicts: &[i8]) -> Self {
        let share = |which: Ordering| {
            verdicts.iter().filter(|v| v.cmp(&&0) == which).count() as f64 / verdicts.len().max(1) as f64
        };
        Self { win: share(Ordering::Greater), tie: share(Ordering::Equal), loss: share(Ordering::Less) }
    }

    /// Win rate in which a tie counts as `tie_weight` of a win, usually ½.
    pub fn rate(&self, tie_weight: f64) -> f64 {
        self.win + tie_weight * self.tie
    }
}

/// Percentile bootstrap interval `(low, high)` of the mean of `values`, from `resamples` resamples. `uniform(n)` is the
/// n-th random number in [0, 1).
pub fn bootstrap(values: &[f64], confidence: f64, resamples: usize, uniform: impl Fn(u64) -> f64) -> (f64, f64) {
    let n = values.len();
    if n == 0 || resamples == 0 {
        return (0.0, 0.0);
    }
    let mean = |resample: usize| {
        let pick = |i: usize| values[((uniform((resample * n + i) as u64) * n as f64) as usize).min(n - 1)];
        (0..n).map(pick).sum::<f64>() / n as f64
    };
    let mut means: Vec<f64> = (0..resamples).map(mean).collect();
    means.sort_by(f64::total_cmp);
    let at = |quantile: f64| means[((quantile * resamples as f64) as usize).min(resamples - 1)];
    (at(0.5 - confidence / 2.0), at(0.5 + confidence / 2.0))
}

/// A win rate at equal lengths, with the regression it comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LengthControlled {
    /// Coefficient of `tanh(length difference / its standard deviation)`.
    pub coefficient: f64,
    /// Intercept of the regression: the log odds at a length difference of 0.
    pub intercept: f64,
    /// Unbiased standard deviation of the length differences.
    pub deviation: f64,
    /// Win rate at a length difference of 0: `σ(intercept)`.
    pub rate: f64,
}

/// Length-controlled win rate: logistic regression of preferences (0 to 1) on the length difference and an intercept,
/// by Newton's method. `ridge` penalises both coefficients. `None` if all differences are equal, or counts do not
/// match.
pub fn length_controlled(preferences: &[f64], differences: &[f64], ridge: f64) -> Option<LengthControlled> {
    let deviation = crate::group::deviation(differences);
    if preferences.len() != differences.len() || deviation == 0.0 {
        return None;
    }
    let x: Vec<f64> = differences.iter().map(|d| (d / deviation).tanh()).collect();
    let (mut slope, mut intercept) = (0.0f64, 0.0f64);
    for _ in 0..200 {
        // Gradient and Hessian of the negative log-likelihood.
        let (mut g, mut h) = ([ridge * slope, ridge * intercept], [ridge, 0.0, ridge]);
        for (x, y) in x.iter().zip(preferences) {
            let p = 1.0 / (1.0 + (-(slope * x + intercept)).exp());
            let w = p * (1.0 - p);
            g[0] += (p - y) * x;
            g[1] += p - y;
            h[0] += w * x * x;
            h[1] += w * x;
            h[2] += w;
        }
        let determinant = h[0] * h[2] - h[1] * h[1];
        if determinant <= f64::MIN_POSITIVE {
            break; // no finite optimum: the lengths separate the preferences
        }
        let step = [(h[2] * g[0] - h[1] * g[1]) / determinant, (h[0] * g[1] - h[1] * g[0]) / determinant];
        slope -= step[0];
        intercept -= step[1];
        if step[0].abs().max(step[1].abs()) < 1e-13 {
            break;
        }
    }
    let rate = 1.0 / (1.0 + (-intercept).exp());
    Some(LengthControlled { coefficient: slope, intercept, deviation, rate })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_contain_the_mean() {
        let values: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let random = |n: u64| ((n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 11) as f64) / (1u64 << 53) as f64;
        let (low, high) = bootstrap(&values, 0.95, 1000, random);
        assert!(low < 0.5 && 0.5 < high && high - low < 0.25, "{low} {high}");
        assert_eq!(bootstrap(&[1.0; 5], 0.95, 100, random), (1.0, 1.0));
    }

    #[test]
    fn equal_lengths_have_no_controlled_rate() {
        assert!(length_controlled(&[0.2, 0.8], &[3.0, 3.0], 0.0).is_none());
    }
}
