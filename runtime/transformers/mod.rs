//! Models of candle-transformers: architectures that Rehearsal scores with but does not train.
//!
//! [`BertEncoder`] is a sentence encoder or a sequence classifier; [`CausalModel`] is a language model that can act as
//! judge. Weights are held on the CPU, in f32 unless a GGUF file is quantised. Every forward pass takes the job's
//! [`Devices`](rehearsal_actors::Devices) and runs on their thread pool; there is no way to run one elsewhere.

#[cfg(feature = "encoders")]
mod bert;
#[cfg(feature = "encoders")]
mod causal;
#[cfg(feature = "encoders")]
mod cpu;
#[cfg(feature = "encoders")]
mod directory;
#[cfg(not(feature = "encoders"))]
mod without;

#[cfg(feature = "encoders")]
pub use bert::BertEncoder;
#[cfg(feature = "encoders")]
pub use causal::{CausalModel, GGUF_ARCHITECTURES, MODEL_TYPES};
#[cfg(not(feature = "encoders"))]
pub use without::{BertEncoder, CausalModel};
