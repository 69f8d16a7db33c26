//! What rank 0 asks the others, and what they answer.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rehearsal_learn::AdamWConfig;
use rehearsal_lm::Precision;
use rehearsal_lm::generate::{Completion, Options};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Wire;
use crate::files::{Described, ModelFiles};
use crate::objective::Portable;
use crate::{Error, LoraInit, MaskedSequence, StepTimes, Tokens};

/// A request of rank 0 to another rank. Tensors that belong to it follow it.
#[derive(Serialize, Deserialize)]
pub enum Request {
    /// Makes a member of a model.
    Build {
        model: u32,
        files: ModelFiles,
        parameters: Vec<Described>,
        config: MemberConfig,
    },
    /// Frees a member.
    Drop {
        model: u32,
    },
    /// Samples completions: each is a reply of its own, before the last one.
    Generate {
        model: u32,
        requests: Vec<(u64, Arc<Vec<u32>>)>,
        options: Options,
        keep_tokens: usize,
    },
    Logprobs {
        model: u32,
        tokens: Vec<Tokens>,
        temperature: f64,
    },
    Likelihoods {
        model: u32,
        sequences: Vec<MaskedSequence>,
    },
    Values {
        model: u32,
        tokens: Vec<Tokens>,
    },
    Scores {
        model: u32,
        tokens: Vec<Tokens>,
    },
    /// Computes the gradients of a range of leaves, and keeps them.
    Gradients {
        model: u32,
        objective: Portable,
        temperature: f64,
        leaves: Range<usize>,
    },
    /// Adds the gradients of all ranks, all together. `nodes` are the sums that each rank has.
    Sum {
        model: u32,
        nodes: Vec<Vec<Node>>,
    },
    /// Updates the weights by the sum, all together.
    Update {
        model: u32,
        learning_rate: f64,
        scale: f64,
    },
    /// The moments that the rank holds.
    Moments {
        model: u32,
    },
    /// Returns to a snapshot, whose tensors follow.
    Restore {
        model: u32,
        version: u64,
        optimizer_steps: u64,
        tensors: Vec<Described>,
    },
    /// Ends what is under way, if it still is.
    Cancel,
    /// Ends the rank.
    Stop,
}

/// A range of leaves that is summed, and whether it has gradients.
pub type Node = (Range<usize>, bool);

/// Settings of a member.
#[derive(Clone, Serialize, Deserialize)]
pub struct MemberConfig {
    pub leaves: usize,
    pub shard: bool,
    pub optimizer: AdamWConfig,
    pub micro_batch_tokens: usize,
    pub bf16: bool,
    pub gradient_checkpointing: bool,
    pub ema_decay: Option<f64>,
    pub lora: Option<LoraInit>,
}

impl MemberConfig {
    pub fn precision(&self) -> Precision {
        if self.bf16 { Precision::Bf16 } else { Precision::F32 }
    }
}

/// An answer to a request.
#[derive(Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// A completion of a request that goes on.
    Completed(Completion),
    Rows(Vec<Vec<f32>>),
    Numbers(Vec<f32>),
    Sums(Vec<f64>),
    Gradients(Vec<NodeSum>),
    /// Sums of squares of the blocks of the rank's part of the gradients.
    Squares(Vec<f64>),
    /// Tensors, which follow.
    Tensors(Vec<Described>),
    Failed(Failure),
}

/// What a sum of leaves has beside its gradients.
#[derive(Serialize, Deserialize)]
pub struct NodeSum {
    pub node: Node,
    pub loss: f64,
    pub tokens: usize,
    pub times: StepTimes,
    pub stats: Vec<(String, f64, f64)>,
}

/// Why a request failed.
#[derive(Serialize, Deserialize)]
pub enum Failure {
    Cancelled,
    Diverged,
    /// It panicked.
    Died(String),
    Other(String),
}

impl Failure {
    pub fn of(error: &Error) -> Self {
        match error {
            Error::Cancelled => Self::Cancelled,
            Error::Diverged => Self::Diverged,
            other => Self::Other(other.to_string()),
        }
    }

    /// The error on rank 0 of a failure on another rank. One that died ends the role on rank 0 too.
    pub fn into_error(self, rank: usize) -> Error {
        match self {
            Self::Cancelled => Error::Cancelled,
            Self::Diverged => Error::Diverged,
            Self::Died(reason) => panic!("rank {rank} {reason}"),
            Self::Other(reason) => Error::Rank { rank, reason },
        }
    }
}

/// Sends a message.
pub fn send(wire: &dyn Wire, to: usize, message: &impl Serialize) {
    match postcard::to_stdvec(message) {
        Ok(bytes) => wire.send(to, &bytes),
        Err(e) => panic!("a message between ranks cannot be written: {e}"),
    }
}

/// Reads a message.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> T {
    match postcard::from_bytes(bytes) {
        Ok(message) => message,
        Err(e) => panic!("a message between ranks cannot be read: {e}; all ranks must run the same build"),
    }
}

/// Waits for the next message of a rank, with short sleeps: spinning would take the core that the sender computes on.
pub fn wait_for(wire: &dyn Wire, from: usize) -> Vec<u8> {
    let mut pause = Pause::default();
    loop {
        match wire.try_receive(from) {
            Some(message) => return message,
            None => pause.sleep(),
        }
    }
}

/// Sleeps between two looks at a wire: longer and longer, up to a millisecond.
#[derive(Default)]
pub struct Pause(u32);

impl Pause {
    pub fn sleep(&mut self) {
        self.0 = (self.0 + 1).min(50);
        std::thread::sleep(Duration::from_micros(20 * u64::from(self.0)));
    }
}
