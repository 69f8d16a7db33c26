//! Statistical rejection sampling (RSO; Liu et al. 2023, "Statistical Rejection Sampling Improves Preference
//! Optimization", algorithm 1): samples of the policy become samples of the optimal policy `π_r ∝ π exp(r / β)`.

/// Probability with which each candidate is accepted in the first pass: `exp((r - max r) / β)`.
pub fn acceptance(rewards: &[f64], beta: f64) -> Vec<f64> {
    let max = rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    rewards.iter().map(|r| ((r - max) / beta).exp()).collect()
}

/// Samples at most `keep` candidates and returns their indices in the order of acceptance.
///
/// Passes over the remaining candidates repeat until enough are accepted. The maximum reward is that of the candidates
/// remaining at the start of a pass, so each pass accepts at least one. `uniform(n)` is the n-th random number in [0,
/// 1). Candidates with equal texts count separately.
pub fn rejection_sampling(rewards: &[f64], beta: f64, keep: usize, mut uniform: impl FnMut(u64) -> f64) -> Vec<usize> {
    let mut accepted = Vec::new();
    let mut left: Vec<usize> = (0..rewards.len()).collect();
    let mut drawn = 0;
    while accepted.len() < keep && !left.is_empty() {
        let max = left.iter().map(|&i| rewards[i]).fold(f64::NEG_INFINITY, f64::max);
        let mut rejected = Vec::new();
        for &i in &left {
            if accepted.len() >= keep {
                break;
            }
            let u = uniform(drawn);
            drawn += 1;
            if u < ((rewards[i] - max) / beta).exp() {
                accepted.push(i);
            } else {
                rejected.push(i);
            }
        }
        left = rejected;
    }
    accepted
}

/// Probabilities of the candidates under the optimal policy, restricted to them: `softmax(r / β)`.
pub fn optimal_weights(rewards: &[f64], beta: f64) -> Vec<f64> {
    let raw = acceptance(rewards, beta);
    let total: f64 = raw.iter().sum();
    raw.into_iter().map(|x| x / total).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cold_sampler_takes_the_best_and_a_hot_one_everything() {
        let rewards = [0.0, 3.0, 1.0, 2.0];
        assert_eq!(rejection_sampling(&rewards, 1e-9, 2, |_| 0.5), [1, 3]);
        assert_eq!(rejection_sampling(&rewards, 1e9, 4, |_| 0.5), [0, 1, 2, 3]);
        assert_eq!(rejection_sampling(&rewards, 0.5, 9, |_| 0.999), [1, 3, 2, 0]);
    }
}
