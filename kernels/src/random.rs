//! Counter-based random numbers: a draw is a function of where it is used, never of what was drawn before.
//!
//! Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The key is the run's
//! seed; the counter is (stream, position). A completion's token at position `t` therefore gets the same
//! uniform whatever the batch, the order, the thread or the number of restarts.
//!
//! A run numbers its streams from 0 to `u64::MAX`; [`Region`] says which numbers belong to which use.

/// A use of random numbers within a run: a range of stream ids that no other use shares.
///
/// The stochastic rounding of optimizer states is not among them: it hashes the step and the element's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// Sampling of completions: the stream of a rollout's id.
    Rollouts,
    /// Sampling of the completions of held-out prompts: the same draws in every evaluation.
    EvaluationRollouts,
    /// The order of data rows: a stream per epoch.
    DataOrder,
    /// The order of a step's completions: a stream per step and epoch of updates.
    Minibatches,
    /// The weights of a new score head: one stream.
    ScoreHeadInit,
    /// The matrices `A` of new LoRA adapters: a stream per adapted weight.
    AdapterInit,
    /// Acceptance of candidates in rejection sampling (RSO): a stream per prompt drawn.
    RejectionSampling,
    /// Bootstrap resampling of win rates: one stream.
    WinRateBootstrap,
}

impl Region {
    /// All regions, in the order of their stream ids.
    pub const ALL: [Region; 8] = [
        Self::Rollouts,
        Self::EvaluationRollouts,
        Self::DataOrder,
        Self::Minibatches,
        Self::ScoreHeadInit,
        Self::AdapterInit,
        Self::RejectionSampling,
        Self::WinRateBootstrap,
    ];

    /// The id of the region's first stream.
    pub const fn first(self) -> u64 {
        match self {
            Self::Rollouts => 0,
            Self::EvaluationRollouts => 1 << 62,
            Self::DataOrder => 1 << 63,
            Self::Minibatches => (1 << 63) + (1 << 61),
            Self::ScoreHeadInit => (1 << 63) + (1 << 62),
            Self::AdapterInit => (1 << 63) + (1 << 62) + 1,
            Self::RejectionSampling => (1 << 63) + (1 << 62) + (1 << 61),
            Self::WinRateBootstrap => u64::MAX,
        }
    }

    /// How many streams the region has.
    pub const fn streams(self) -> u64 {
        match self {
            Self::Rollouts | Self::EvaluationRollouts => 1 << 62,
            Self::DataOrder | Self::Minibatches => 1 << 61,
            Self::ScoreHeadInit | Self::WinRateBootstrap => 1,
            Self::AdapterInit | Self::RejectionSampling => (1 << 61) - 1,
        }
    }
}

/// An endless sequence of independent draws, addressed by position.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
    id: u64,
}

impl Stream {
    /// The stream at an index of a region.
    ///
    /// # Panics
    /// If `index` is not below [`Region::streams`].
    pub fn in_region(seed: u64, region: Region, index: u64) -> Self {
        assert!(index < region.streams(), "stream {index} of {region:?}, which has {}", region.streams());
        Self::new(seed, region.first() + index)
    }

    /// The stream `id` of the run with this seed.
    pub fn new(seed: u64, id: u64) -> Self {
        Self { seed, id }
    }

    /// Sixty-four random bits at a position.
    pub fn bits(&self, position: u64) -> u64 {
        let counter = [position as u32, (position >> 32) as u32, self.id as u32, (self.id >> 32) as u32];
        let [a, b, ..] = philox(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        a as u64 | (b as u64) << 32
    }

    /// A uniform number in `[0, 1)` with 53 random bits.
    pub fn uniform(&self, position: u64) -> f64 {
        (self.bits(position) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A standard normal number (Box–Muller over the two uniforms at `2 * position`).
    pub fn normal(&self, position: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(2 * position)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(2 * position + 1)).cos()
    }

    /// A permutation of `0..n` (Fisher–Yates).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            // Multiply-shift keeps the bias below 2^-64 * n.
            let j = ((self.bits(i as u64) as u128 * (i as u128 + 1)) >> 64) as usize;
            order.swap(i, j);
        }
        order
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = counter[0] as u64 * 0xD251_1F53;
        let p1 = counter[2] as u64 * 0xCD9E_8D57;
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors that come with Random123.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    /// Streams made by other versions of this program must not change: a resumed run draws the same numbers.
    #[test]
    fn regions_begin_where_they_always_did_and_do_not_overlap() {
        let first = Region::ALL.map(Region::first);
        assert_eq!(
            first,
            [
                0,
                0x4000_0000_0000_0000,
                0x8000_0000_0000_0000,
                0xa000_0000_0000_0000,
                0xc000_0000_0000_0000,
                0xc000_0000_0000_0001,
                0xe000_0000_0000_0000,
                0xffff_ffff_ffff_ffff,
            ]
        );
        for pair in Region::ALL.windows(2) {
            assert_eq!(pair[0].first() + pair[0].streams(), pair[1].first(), "{pair:?}");
        }
        let (a, b) = (Stream::in_region(3, Region::Minibatches, 5), Stream::new(3, (1 << 63) + (1 << 61) + 5));
        assert_eq!(a.bits(9), b.bits(9));
    }

    #[test]
    fn uniforms_fill_the_interval() {
        let stream = Stream::new(1, 2);
        let mean = (0..10_000).map(|i| stream.uniform(i)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }

    #[test]
    fn a_permutation_is_one() {
        let mut order = Stream::new(3, 4).permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
