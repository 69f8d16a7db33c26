//! The order in which rows are drawn.

use rehearsal_lm::random::{Region, Stream};

/// Row indices of draws `cursor .. cursor + n`. Each epoch is a permutation of all `total` rows, a function of seed and
/// epoch.
pub fn order(seed: u64, cursor: u64, n: usize, total: usize) -> Vec<usize> {
    let mut permutation = (u64::MAX, Vec::new());
    (cursor..cursor + n as u64)
        .map(|at| {
            let epoch = at / total as u64;
            if permutation.0 != epoch {
                permutation = (epoch, Stream::in_region(seed, Region::DataOrder, epoch).permutation(total));
            }
            permutation.1[(at % total as u64) as usize]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_wherever_it_is_cut() {
        let at_once = order(1, 0, 30, 10);
        let in_parts: Vec<usize> = (0..30).step_by(3).flat_map(|cursor| order(1, cursor, 3, 10)).collect();
        assert_eq!(at_once, in_parts);
        for epoch in at_once.chunks(10) {
            let mut epoch = epoch.to_vec();
            epoch.sort();
            assert_eq!(epoch, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(at_once[..10], at_once[10..20]);
    }

    proptest::proptest! {
        #[test]
        fn draws_that_go_on_from_a_cursor_are_those_of_one_run(
            seed in proptest::prelude::any::<u64>(),
            total in 1usize..50,
            parts in proptest::collection::vec(0usize..30, 0..12),
        ) {
            let draws = parts.iter().sum();
            let (mut cursor, mut in_parts) = (0, Vec::new());
            for n in parts {
                in_parts.extend(order(seed, cursor, n, total));
                cursor += n as u64;
            }
            assert_eq!(in_parts, order(seed, 0, draws, total));
            for epoch in in_parts.chunks_exact(total) {
                let mut epoch = epoch.to_vec();
                epoch.sort();
                assert!(epoch.into_iter().eq(0..total));
            }
        }
    }
}
