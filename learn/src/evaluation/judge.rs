//! Preferences of a judge that is shown two answers in both orders, from the probabilities of its verdict tokens (OAIF,
//! Guo et al. 2024; RLAIF, Lee et al. 2023).

use std::cmp::Ordering;

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

    /// Whether the judge's choice is the same in both orders: one of the answers, or a tie.
    pub fn consistent(&self) -> bool {
        choice(self.shown_first) == choice(self.shown_second)
    }
}

/// The choice that a probability is: greater for the first answer, less for the second, equal for a tie. `None` if it is
/// not a number.
pub fn choice(first: f64) -> Option<Ordering> {
    first.partial_cmp(&0.5)
}

/// Position bias: share of verdicts, over both orders, for the answer shown first; a tie counts half. 0.5 without bias.
pub fn first_position_rate(verdicts: &[BothOrders]) -> f64 {
    let share = |chosen: Option<Ordering>, first: Ordering| match chosen {
        Some(Ordering::Equal) | None => 0.5,
        Some(chosen) => f64::from(chosen == first),
    };
    let of = |v: &BothOrders| {
        share(choice(v.shown_first), Ordering::Greater) + share(choice(v.shown_second), Ordering::Less)
    };
    verdicts.iter().map(of).sum::<f64>() / (2.0 * verdicts.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tie_is_neither_answer() {
        let both = |shown_first, shown_second| BothOrders { shown_first, shown_second };
        assert!(both(0.5, 0.5).consistent() && both(0.9, 0.6).consistent() && both(0.1, 0.2).consistent());
        assert!(!both(0.5, 0.4).consistent() && !both(0.9, 0.5).consistent() && !both(0.9, 0.1).consistent());
        assert_eq!(first_position_rate(&[both(0.5, 0.5)]), 0.5);
        assert_eq!(first_position_rate(&[both(0.9, 0.5)]), 0.75);
        assert_eq!(first_position_rate(&[both(0.9, 0.1)]), 1.0);
        assert_eq!(first_position_rate(&[both(0.9, 0.8)]), 0.5);
    }
}
