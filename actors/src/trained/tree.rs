//! The order in which the leaves of a step are added: a fixed tree, whoever computes them.

use std::ops::Range;

/// Sums of leaves, added along a binary tree: the sum of a range of leaves is that of its first half, the longer one
/// where they differ, plus that of its second half. Consecutive ranges are pushed from left to right, and two that are the halves of a
/// range are added at once. So the result is the same for every division of the leaves into ranges, and a range in
/// progress holds as many sums as the tree is deep, at most.
pub(crate) struct Tree<T> {
    leaves: usize,
    sums: Vec<(Range<usize>, T)>,
}

impl<T> Tree<T> {
    /// An empty sum of some of the leaves `0..leaves`.
    pub fn new(leaves: usize) -> Self {
        Self { leaves, sums: Vec::new() }
    }

    /// Adds the sum of the leaves that come right after those that are there.
    pub fn push<E>(
        &mut self,
        leaves: Range<usize>,
        sum: T,
        mut add: impl FnMut(T, T) -> Result<T, E>,
    ) -> Result<(), E> {
        self.sums.push((leaves, sum));
        while let [.., (left, _), (right, _)] = self.sums.as_slice()
            && self.halves(left, right)
        {
            let (Some((right, b)), Some((left, a))) = (self.sums.pop(), self.sums.pop()) else { break };
            self.sums.push((left.start..right.end, add(a, b)?));
        }
        Ok(())
    }

    /// The sums that are left: one where all leaves of a node of the tree have been pushed.
    pub fn into_sums(self) -> Vec<(Range<usize>, T)> {
        self.sums
    }

    /// Whether two ranges are the halves of a node of the tree.
    fn halves(&self, left: &Range<usize>, right: &Range<usize>) -> bool {
        let mut node = 0..self.leaves;
        while node.len() > 1 && node.start <= left.start && right.end <= node.end {
            let middle = node.start + node.len().div_ceil(2);
            if node == (left.start..right.end) {
                return middle == left.end;
            }
            node = if left.start < middle { node.start..middle } else { middle..node.end };
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// The sum of a range of leaves, written with its brackets, as its parts.
    fn sums(leaves: usize, range: Range<usize>) -> Vec<(Range<usize>, String)> {
        let mut tree = Tree::new(leaves);
        for leaf in range {
            let Ok(()) = tree.push::<Infallible>(leaf..leaf + 1, leaf.to_string(), |a, b| Ok(format!("({a}+{b})")));
        }
        tree.into_sums()
    }

    #[test]
    fn leaves_are_added_in_halves() {
        let whole = |leaves| sums(leaves, 0..leaves)[0].1.clone();
        assert_eq!(whole(1), "0");
        assert_eq!(whole(4), "((0+1)+(2+3))");
        assert_eq!(whole(6), "(((0+1)+2)+((3+4)+5))");
    }

    proptest::proptest! {
        #[test]
        fn every_division_into_ranges_gives_the_same_sum(leaves in 1usize..40, cuts in proptest::collection::vec(0usize..40, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(leaves)).chain([0, leaves]).collect();
            cuts.sort_unstable();
            let mut tree = Tree::new(leaves);
            for cut in cuts.windows(2) {
                let parts = sums(leaves, cut[0]..cut[1]);
                proptest::prop_assert!(parts.len() <= 2 * leaves.ilog2() as usize + 2);
                for (range, sum) in parts {
                    let Ok(()) = tree.push::<Infallible>(range, sum, |a, b| Ok(format!("({a}+{b})")));
                }
            }
            proptest::prop_assert_eq!(tree.into_sums(), sums(leaves, 0..leaves));
        }
    }
}
