//! Memory that a model needs on the CPU, predicted from its architecture.

use rehearsal_kernels::attention::KEY_BLOCK;
use rehearsal_kernels::gemm::Precision;

use super::architecture::Architecture;

const F32: u64 = 4;

fn width(precision: Precision) -> u64 {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    }
}

impl Architecture {
    /// Number of parameters; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        self.parameters().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
    }

    /// Bytes of the weights packed for generation.
    pub fn packed_bytes(&self, precision: Precision) -> u64 {
        let tied_head = if self.tied { 0 } else { (self.vocab * self.hidden) as u64 };
        // The embedding is looked up, not packed; a tied one is packed as the head.
        (self.parameter_count() - tied_head) * width(precision)
    }

    /// Bytes of the KV cache of `sequences` sequences of at most `tokens` tokens.
    pub fn cache_bytes(&self, sequences: u64, tokens: u64) -> u64 {
        let per_token = 2 * self.layers as u64 * self.attention(0).key_width() as u64 * F32;
        sequences * tokens.next_multiple_of(KEY_BLOCK as u64) * per_token
    }

    /// Peak bytes of a forward and backward pass over `tokens` tokens, without weights and gradients.
    pub fn activation_bytes(&self, tokens: u64, precision: Precision, gradient_checkpointing: bool) -> u64 {
        let heads = self.attention(0);
        let (hidden, qkv, q, mlp) =
            (self.hidden as u64, heads.width() as u64, heads.query_width() as u64, self.mlp as u64);
        let (gates, outer) = (if self.gated { 2 } else { 1 }, if self.sandwich { 2 } else { 0 });
        let block = ((2 + outer) * hidden + qkv + q + gates * mlp) * width(precision) + heads.queries as u64 * F32;
        let layers = self.layers as u64;
        let kept = if gradient_checkpointing { layers * hidden * F32 + block } else { layers * block };
        // Buffers of the pass itself, forward and backward, and a packed copy of a GEMM's input.
        let working = (6 * hidden + 2 * qkv + q + 4 * mlp) * F32 + mlp * width(precision);
        tokens * (kept + working)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn predictions_are_sums_of_shapes() {
        let arch = testing::checkpoint().architecture;
        let parameters: u64 = testing::checkpoint().parameters.values().map(|t| t.elem_count() as u64).sum();
        assert_eq!(arch.parameter_count(), parameters);
        assert_eq!(arch.packed_bytes(Precision::Bf16) * 2, arch.packed_bytes(Precision::F32));
        // Two layers, two key heads of 4, keys and values, f32; 65 tokens take two blocks of 64.
        assert_eq!(arch.cache_bytes(3, 65), 3 * 128 * 2 * 2 * 8 * 4);
        let whole = arch.activation_bytes(10, Precision::F32, false);
        assert!(arch.activation_bytes(10, Precision::F32, true) < whole);
        assert!(arch.activation_bytes(10, Precision::Bf16, false) < whole);
    }
}
