//! A judge that reads two answers in both orders, by the probabilities of its verdict tokens (OAIF, Guo et al. 2024;
//! RLAIF, Lee et al. 2023).

/// What a judge that saw both orders thinks of the first of two answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BothOrders {
    /// Probability that the first answer is better, when it is shown first.
    pub shown_first: f64,
    /// The same, when it is shown second.
    pub shown_second: f64,
}

impl BothOrders {
    /// From the logits of the tokens "1" and "2" in each order.
    pub fn from_logits(order_12: [f64; 2], order_21: [f64; 2]) -> Self {
        let first = |[one, two]: [f64; 2]| 1.0 / (1.0 + (two - one).exp());
        Self { shown_first: first(order_12), shown_second: 1.0 - first(order_21) }
    }

    /// The average over orders, free of a bias for a place.
    pub fn probability(&self) -> f64 {
        0.5 * (self.shown_first + self.shown_second)
    }

    /// Whether both orders name the same answer.
    pub fn consistent(&self) -> bool {
        (self.shown_first > 0.5) == (self.shown_second > 0.5)
    }
}

/// Share of verdicts, over both orders, for the answer that was shown first: 0.5 without position bias.
pub fn first_position_rate(verdicts: &[BothOrders]) -> f64 {
    let of = |v: &BothOrders| f64::from(v.shown_first > 0.5) + f64::from(v.shown_second <= 0.5);
    verdicts.iter().map(of).sum::<f64>() / (2.0 * verdicts.len().max(1) as f64)
}
