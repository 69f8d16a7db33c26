//! The embedded model and its prompts: a whole job without any download. [`make`] trains the model.

mod corpus;
pub mod make;

pub use corpus::prompts;

use rehearsal_lm::{Checkpoint, Files};

/// Loads the embedded model: 0.46 million parameters, trained to answer short questions courteously, curtly or
/// neutrally.
pub fn model() -> rehearsal_lm::Result<Checkpoint> {
    let files = Files {
        config: include_bytes!("config.json"),
        tokenizer: include_bytes!("tokenizer.json"),
        tokenizer_config: include_bytes!("tokenizer_config.json"),
        weights: include_bytes!("model.safetensors"),
    };
    Checkpoint::from_files(files, "the embedded model")
}
