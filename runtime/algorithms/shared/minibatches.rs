//! Learning from one step's completions several times: epochs of minibatches in an order that the seed fixes.

use rehearsal_lm::random::{Region, Stream};

use crate::config::{Keys, Range, Settings};

/// `[update]`: how often the completions of a step are learned from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpdateSettings {
    /// Passes over the completions of a step; 1 or more.
    pub epochs: usize,
    /// Optimizer steps of a pass; 1 or more.
    pub minibatches: usize,
}

impl Default for UpdateSettings {
    fn default() -> Self {
        Self { epochs: 1, minibatches: 1 }
    }
}

impl Settings for UpdateSettings {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("update");
        let help = "`ppo`, `iterative_dpo`, `rso`: passes over the completions of a step.";
        s.integer("epochs", &mut self.epochs, Range::within(1.0, 1000.0), help);
        let help = "Optimizer updates of each pass.";
        s.integer("minibatches", &mut self.minibatches, Range::within(1.0, 65_536.0), help);
    }
}

/// The minibatches of a step over `items` items, epoch by epoch: each epoch is a permutation cut into equal parts.
pub fn minibatches(seed: u64, step: u64, items: usize, update: UpdateSettings) -> Vec<Vec<usize>> {
    let parts = update.minibatches.min(items).max(1);
    let epoch = |epoch: usize| {
        let stream = Stream::in_region(seed, Region::Minibatches, step * update.epochs as u64 + epoch as u64);
        let order = stream.permutation(items);
        (0..parts).map(move |part| order[part * items / parts..(part + 1) * items / parts].to_vec()).collect::<Vec<_>>()
    };
    (0..update.epochs).flat_map(epoch).filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_takes_every_item_once() {
        let update = UpdateSettings { epochs: 3, minibatches: 4 };
        let all = minibatches(1, 7, 10, update);
        assert_eq!(all.len(), 12);
        for epoch in all.chunks(4) {
            let mut items: Vec<usize> = epoch.concat();
            items.sort();
            assert_eq!(items, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(all[..4], all[4..8]);
        assert_eq!(all, minibatches(1, 7, 10, update));
        assert_eq!(minibatches(1, 7, 2, update).len(), 6);
    }
}
