//! From scores of the completions of one prompt to a pair: best against worst.

/// What becomes of a prompt whose best and worst completion score the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TieRule {
    /// No pair; the tie is counted.
    #[default]
    Skip,
    /// The first completion is chosen over the last of the worst (TRL).
    First,
}

/// Indices into the completions of one prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    pub chosen: usize,
    pub rejected: usize,
    /// Score of the chosen minus score of the rejected.
    pub margin: f64,
}

/// The pair of one prompt, or none for a tie under [`TieRule::Skip`] or fewer than two completions.
///
/// The first of the best wins, the last of the worst loses. Scores that are not numbers have no place here; the
/// reward role refuses them.
pub fn select_pair(scores: &[f64], ties: TieRule) -> Option<Pair> {
    let chosen = (0..scores.len()).reduce(|best, i| if scores[i] > scores[best] { i } else { best })?;
    let rejected = (0..scores.len())
        .filter(|&i| i != chosen)
        .reduce(|worst, i| if scores[i] <= scores[worst] { i } else { worst })?;
    let margin = scores[chosen] - scores[rejected];
    (margin > 0.0 || ties == TieRule::First).then_some(Pair { chosen, rejected, margin })
}

/// A completion that did not end by itself loses this much before it is compared (TRL's `missing_eos_penalty`).
pub fn penalise_missing_eos(score: f64, ended: bool, penalty: f64) -> f64 {
    if ended { score } else { score - penalty }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_meets_worst() {
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
