//! The tiny model inside this program, with prompts to try it on. [`make`] made it.

mod corpus;
pub mod make;

pub use corpus::prompts;

use rehearsal_lm::{Checkpoint, Files};

/// The embedded model: 0.45 million parameters, taught to answer small questions, politely or not.
pub fn model() -> rehearsal_lm::Result<Checkpoint> {
    let files = Files {
        config: include_bytes!("config.json"),
        tokenizer: include_bytes!("tokenizer.json"),
        tokenizer_config: include_bytes!("tokenizer_config.json"),
        weights: include_bytes!("model.safetensors"),
    };
    Checkpoint::from_files(files, "the embedded model")
}
