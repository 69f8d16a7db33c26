//! Repetition.

use std::collections::BTreeSet;

/// Penalty for repeated n-grams of tokens (Yeo et al. 2025, appendix C.2): `penalty × (1 - distinct n-grams / n-grams)`, and 0 for fewer
/// than `n` tokens. `penalty` is what a completion gets that does nothing else; 0 or less.
///
/// ```
/// use rehearsal::rewards::verify::repetition::repetition;
///
/// assert_eq!(repetition(&[1, 2, 3, 4], 2, -1.0), 0.0);
/// assert_eq!(repetition(&[5, 5, 5], 2, -1.0), -0.5);
/// ```
pub fn repetition(tokens: &[u32], n: usize, penalty: f64) -> f64 {
    let all = tokens.windows(n.max(1));
    let count = all.len();
    if count == 0 {
        return 0.0;
    }
    let distinct = all.collect::<BTreeSet<_>>().len();
    (1.0 - distinct as f64 / count as f64) * penalty
}
