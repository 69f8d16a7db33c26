//! A decoder by hand: one transformer block, forward and back, written once over the few [operations](Ops) that a
//! machine provides. The plain-candle graph ([`crate::forward`]) computes the same and is the oracle.

mod block;
mod head;
mod ops;
mod train;

pub use block::{Activations, Buffers, PreparedBlock, Rows, norm};
pub use ops::{Answers, Mlp, Norm, Ops, Question, Sum};
pub use train::{Trace, output};
