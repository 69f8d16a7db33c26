//! What coordinator and nodes say to each other: bodies of HTTPS requests, in postcard.

use rehearsal_actors::{Described, LoraInit, ModelFiles};
use rehearsal_lm::generate::{Completion, Options};
use serde::{Deserialize, Serialize};

use super::settings::COMPLETION_TOKENS_MAX;

/// Version of these messages. Another one is refused.
pub const PROTOCOL: u32 = 1;

/// Bytes of a request's body at most.
pub const BODY_MAX: usize = 4 << 20;

/// What decides the bits of a completion beside weights and request: a node must have the coordinator's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bits {
    /// Version of the messages.
    pub protocol: u32,
    /// Version of the program.
    pub build: String,
    /// Kind of the device that generates.
    pub device: String,
}

impl Bits {
    /// Those of this program, on the CPU.
    pub fn here() -> Self {
        Self { protocol: PROTOCOL, build: env!("CARGO_PKG_VERSION").into(), device: "cpu".into() }
    }

    /// Why a node with these is refused by a coordinator with `wanted`.
    pub fn differ(&self, wanted: &Self) -> Option<String> {
        let reason = |what: &str, here: &str, there: &str, mend: &str| {
            Some(format!("the node has {what} {here} and the coordinator {there}; {mend}"))
        };
        let same = "start the node with the coordinator's program";
        if self.protocol != wanted.protocol {
            return reason("protocol", &self.protocol.to_string(), &wanted.protocol.to_string(), same);
        }
        if self.build != wanted.build {
            return reason("version", &self.build, &wanted.build, same);
        }
        if self.device != wanted.device {
            let mend = "give the job devices of one kind, which round alike";
            return reason("device", &self.device, &wanted.device, mend);
        }
        None
    }
}

/// A node that wants to generate.
#[derive(Debug, Serialize, Deserialize)]
pub struct Join {
    pub name: String,
    pub bits: Bits,
}

/// What a node generates with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Joined {
    /// Names the node in its further requests.
    pub session: u64,
    pub files: ModelFiles,
    /// Weights that the policy started from.
    pub start: Manifest,
    pub bf16: bool,
    pub lora: Option<LoraInit>,
    /// Seconds until a lease that is not renewed ends.
    pub lease_seconds: u64,
}

/// Weights as shards: one for each tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Number of updates of the weights.
    pub version: u64,
    pub shards: Vec<Shard>,
}

/// A tensor, by the hash of its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    pub tensor: Described,
    /// BLAKE3 in hexadecimal digits.
    pub hash: String,
    /// Bytes.
    pub len: u64,
}

/// Completions to generate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Lease {
    pub id: u64,
    pub weights: Manifest,
    pub options: Options,
    /// Prompts, and the ids of their completions.
    pub prompts: Vec<(Vec<u32>, Vec<u64>)>,
}

/// What a node has generated.
#[derive(Debug, Serialize, Deserialize)]
pub struct Delivery {
    pub session: u64,
    pub lease: u64,
    pub completions: Vec<Completion>,
}

/// Bytes of a delivered token at most: its number takes 5 as a varint, and its log-probability 4.
const TOKEN_BYTES_MAX: usize = 9;
/// Bytes of a completion at most, beside its tokens; and of a delivery, beside its completions.
const COMPLETION_BYTES_MAX: usize = 64;
const _: () = assert!(COMPLETION_TOKENS_MAX * TOKEN_BYTES_MAX + 2 * COMPLETION_BYTES_MAX <= BODY_MAX);

impl Delivery {
    /// Number of completions of up to `tokens` tokens each that fit into one delivery; at least 1.
    pub fn completions_max(tokens: usize) -> usize {
        let each = tokens.saturating_mul(TOKEN_BYTES_MAX).saturating_add(COMPLETION_BYTES_MAX);
        ((BODY_MAX - COMPLETION_BYTES_MAX) / each).max(1)
    }
}

/// A node is there, and works on a lease if it has one.
#[derive(Debug, Serialize, Deserialize)]
pub struct Beat {
    pub session: u64,
    pub lease: Option<u64>,
}

/// The answer to a beat.
#[derive(Debug, Serialize, Deserialize)]
pub struct Beaten {
    /// Whether the node still has its lease.
    pub holds: bool,
}

#[cfg(test)]
mod tests {
    use rehearsal_lm::generate::Finish;

    use super::*;

    #[test]
    fn the_longest_completions_that_a_lease_may_have_fit_into_a_delivery() {
        for tokens in [1, 100, 40_000, COMPLETION_TOKENS_MAX] {
            let completion = Completion {
                id: u64::MAX,
                tokens: vec![u32::MAX; tokens],
                logprobs: vec![-1.0; tokens],
                finish: Finish::Length,
            };
            let completions = vec![completion; Delivery::completions_max(tokens)];
            let delivery = Delivery { session: u64::MAX, lease: u64::MAX, completions };
            let bytes = postcard::to_stdvec(&delivery).unwrap().len();
            assert!(bytes <= BODY_MAX, "{tokens} tokens: {bytes} bytes");
        }
        assert_eq!(Delivery::completions_max(COMPLETION_TOKENS_MAX), 1);
    }
}
