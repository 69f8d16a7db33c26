//! Causal grouped-query attention. Scores exist for one block of queries at a time, and the backward pass recomputes
//! them.
//!
//! Decoding ([`attend`]: one new row against the KV cache) and training ([`forward`]: packed sequences) compute each
//! element by the same chain of operations, so the sampler's and the trainer's log-probabilities are the same bits.

mod backward;
mod cached;
mod family;
mod forward;
mod heads;
mod scratch;

pub use backward::{Saved, backward};
pub use cached::attend;
pub use family::Family;
pub use forward::forward;
pub use heads::{Heads, KEY_BLOCK};
