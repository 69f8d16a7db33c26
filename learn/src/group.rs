//! Advantages without a critic: each completion is compared with the others of its prompt.

/// Leave-one-out advantages (RLOO; Kool et al. 2019, Ahmadian et al. 2024): `A_i = r_i - mean_{j≠i} r_j`, within
/// consecutive groups of `group` rewards. The advantage of a group of one is 0.
pub fn rloo(rewards: &[f64], group: usize) -> Vec<f64> {
    rloo_of(rewards.chunks(group.max(1)))
}

/// [`rloo`] of groups of any sizes.
pub fn rloo_of<'a>(groups: impl Iterator<Item = &'a [f64]>) -> Vec<f64> {
    let of = |rewards: &[f64]| {
        let (sum, n) = (rewards.iter().sum::<f64>(), rewards.len() as f64);
        rewards.iter().map(|r| if n > 1.0 { r - (sum - r) / (n - 1.0) } else { 0.0 }).collect::<Vec<_>>()
    };
    groups.flat_map(of).collect()
}

/// Divisor of GRPO's centred rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GroupScale {
    /// The unbiased standard deviation of the group (Shao et al. 2024).
    #[default]
    Group,
    /// The unbiased standard deviation of the batch.
    Batch,
    /// No division (Dr. GRPO, Liu et al. 2025).
    None,
}

/// Group-relative advantages (GRPO, Shao et al. 2024): `(r - mean of the group) / (std + eps)`, within consecutive
/// groups of `group` rewards.
pub fn grpo(rewards: &[f64], group: usize, scale: GroupScale, eps: f64) -> Vec<f64> {
    grpo_of(rewards, rewards.chunks(group.max(1)), scale, eps)
}

/// [`grpo`] of groups of any sizes; `rewards` holds all of them.
pub fn grpo_of<'a>(rewards: &[f64], groups: impl Iterator<Item = &'a [f64]>, scale: GroupScale, eps: f64) -> Vec<f64> {
    let batch = deviation(rewards);
    let of = |rewards: &[f64]| {
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        let divisor = match scale {
            GroupScale::Group => deviation(rewards) + eps,
            GroupScale::Batch => batch + eps,
            GroupScale::None => 1.0,
        };
        rewards.iter().map(|r| (r - mean) / divisor).collect::<Vec<_>>()
    };
    groups.flat_map(of).collect()
}

/// Unbiased standard deviation; 0 for fewer than two values.
pub fn deviation(x: &[f64]) -> f64 {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    if x.len() < 2 { 0.0 } else { (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rewards_have_no_advantage() {
        assert_eq!(grpo(&[2.0; 4], 2, GroupScale::Group, 1e-4), [0.0; 4]);
        assert_eq!(rloo(&[2.0, 2.0, 5.0], 2), [0.0, 0.0, 0.0]);
        assert_eq!(rloo(&[1.0, 3.0], 2), [-2.0, 2.0]);
    }

    #[test]
    fn groups_may_differ_in_size() {
        let rewards = [1.0, 3.0, 5.0];
        let groups = || [&rewards[..2], &rewards[2..]].into_iter();
        assert_eq!(rloo_of(groups()), [-2.0, 2.0, 0.0]);
        assert_eq!(grpo_of(&rewards, groups(), GroupScale::None, 1e-4), [-1.0, 1.0, 0.0]);
    }
}
