//! Selects preference pairs, best against worst, from the scores of the completions of a prompt.

/// Treatment of a prompt whose best and worst completion have equal scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TieRule {
    /// The prompt gives no pair.
    #[default]
    Skip,
    /// The first completion is chosen, the last one rejected, with margin 0 (TRL).
    First,
}

/// A preference pair: indices into the completions of one prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Index of the chosen completion.
    pub chosen: usize,
    /// Index of the rejected completion.
    pub rejected: usize,
    /// Score of the chosen minus score of the rejected.
    pub margin: f64,
}

/// Selects the pair of one prompt: the first of the best completions against the last of the worst. `None` for fewer
/// than two completions, or for a tie under [`TieRule::Skip`].
///
/// `scores` must not contain NaN.
pub fn select_pair(scores: &[f64], ties: TieRule) -> Option<Pair> {
    let chosen = (0..scores.len()).reduce(|best, i| if scores[i] > scores[best] { i } else { best })?;
    let rejected = (0..scores.len())
        .filter(|&i| i != chosen)
        .reduce(|worst, i| if scores[i] <= scores[worst] { i } else { worst })?;
    let margin = scores[chosen] - scores[rejected];
    (margin > 0.0 || ties == TieRule::First).then_some(Pair { chosen, rejected, margin })
}

/// Score minus `penalty` if the completion was truncated: it has no end-of-sequence token (TRL's
/// `missing_eos_penalty`).
pub fn penalise_missing_eos(score: f64, ended: bool, penalty: f64) -> f64 {
    if ended { score } else { score - penalty }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_paired_with_the_worst() {
        let pair = select_pair(&[0.0, 3.0, -1.0, 2.0], TieRule::Skip);
        assert_eq!(pair, Some(Pair { chosen: 1, rejected: 2, margin: 4.0 }));
        assert_eq!(select_pair(&[5.0; 4], TieRule::Skip), None);
    }

    #[test]
    fn a_tie_is_no_pair_or_the_first_one() {
        assert_eq!(select_pair(&[1.0, 1.0], TieRule::Skip), None);
        assert_eq!(select_pair(&[1.0, 1.0], TieRule::First), Some(Pair { chosen: 0, rejected: 1, margin: 0.0 }));
        assert_eq!(select_pair(&[1.0], TieRule::First), None);
    }
}
