//! Preferences of a judge that is shown two answers in both orders, from the probabilities of its verdict tokens (OAIF,
//! Guo et al. 2024; RLAIF, Lee et al. 2023).

/// A judge's preference for the first of two answers, in both orders.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BothOrders {
    /// Probability that the first answer is better, judged with it shown first.
    pub shown_first: f64,
    /// Probability that the first answer is better, judged with it shown second.
    pub shown_second: f64,
}

impl BothOrders {
    /// Preference from the logits of the verdict tokens "1" and "2": with the first answer shown first, and second.
    pub fn from_logits(order_12: [f64; 2], order_21: [f64; 2]) -> Self {
        let first = |[one, two]: [f64; 2]| 1.0 / (1.0 + (two - one).exp());
        Self { shown_first: first(order_12), shown_second: 1.0 - first(order_21) }
    }

    /// Probability that the first answer is better, averaged over both orders, which cancels position bias.
    pub fn probability(&self) -> f64 {
        0.5 * (self.shown_first + self.shown_second)
    }

    /// Whether the judge prefers the same answer in both orders.
    pub fn consistent(&self) -> bool {
        (self.shown_first > 0.5) == (self.shown_second > 0.5)
    }
}

/// Position bias: share of verdicts, over both orders, for the answer shown first. 0.5 without bias.
pub fn first_position_rate(verdicts: &[BothOrders]) -> f64 {
    let of = |v: &BothOrders| f64::from(v.shown_first > 0.5) + f64::from(v.shown_second <= 0.5);
    verdicts.iter().map(of).sum::<f64>() / (2.0 * verdicts.len().max(1) as f64)
}
