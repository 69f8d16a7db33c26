//! Forward and backward passes of a decoder without autograd: a transformer block written once over the
//! [operations](Ops) that a backend provides. Tests compare them with the candle graphs of [`crate::forward`].

mod block;
mod head;
mod ops;
mod train;

pub use block::{Activations, Buffers, PreparedBlock, Rows, norm};
pub use ops::{Answers, Mlp, Norm, Ops, Question, Sum};
pub use train::{Trace, output};
