//! Rewards that depend on a completion's length in tokens.

/// Soft overlong punishment (DAPO, Yu et al. 2025, eq. 13): 0 up to `max - cache` tokens, then falling in a straight line to -1 at
/// `max` tokens, and -1 beyond.
///
/// ```
/// use rehearsal::rewards::verify::length::soft_overlong;
///
/// assert_eq!([70, 90, 100, 120].map(|n| soft_overlong(n, 100, 20)), [0.0, -0.5, -1.0, -1.0]);
/// ```
pub fn soft_overlong(tokens: usize, max: usize, cache: usize) -> f64 {
    let free = max.saturating_sub(cache);
    if tokens <= free {
        0.0
    } else if tokens >= max {
        -1.0
    } else {
        (free as f64 - tokens as f64) / (max - free) as f64
    }
}

/// Bounds of [`cosine_scaled`], for the shortest and the longest completion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cosine {
    /// Length from which the reward is that of the longest.
    pub tokens_max: usize,
    /// Reward of a correct answer: of 0 tokens, and of `tokens_max`.
    pub correct: [f64; 2],
    /// Reward of a wrong answer: of 0 tokens, and of `tokens_max`.
    pub wrong: [f64; 2],
}

/// Length-scaled reward (Yeo et al. 2025, appendix C.1): a correct answer is worth more the shorter it is, and a wrong one less, along
/// half a cosine.
pub fn cosine_scaled(correct: bool, tokens: usize, bounds: &Cosine) -> f64 {
    let share = tokens.min(bounds.tokens_max) as f64 / bounds.tokens_max.max(1) as f64;
    let [short, long] = if correct { bounds.correct } else { bounds.wrong };
    long + 0.5 * (short - long) * (1.0 + (share * std::f64::consts::PI).cos())
}
