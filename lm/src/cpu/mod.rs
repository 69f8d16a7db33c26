//! A pass on the CPU: the [kernels](rehearsal_kernels) over vectors of f32.
//!
//! Weights are read from candle's storage and packed into panels for the products. Everything between two products is
//! f32. In bfloat16 precision the factors are rounded when they are packed, and activations when they are kept for the
//! backward pass.

mod kept;
mod machine;
mod ops;
mod recording;
mod rows;
mod weights;

pub use machine::Cpu;
pub use recording::{Recorder, Recording, Trail};
pub use weights::{pack_into, with_views};
