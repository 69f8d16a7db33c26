//! Counter-based random numbers: a draw is a function of where it is used, never of what was drawn before.
//!
//! Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The key is the run's
//! seed; the counter is (stream, position). A completion's token at position `t` therefore gets the same
//! uniform whatever the batch, the order, the thread or the number of restarts.

/// An endless sequence of independent draws, addressed by position.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    seed: u64,
    id: u64,
}

impl Stream {
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
