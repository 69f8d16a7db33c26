//! Reads models, whatever the format of their files.

use std::path::Path;

use super::checkpoint::{Checkpoint, Files};
use super::{gguf, hf};
use crate::error::{Error, Result};

impl Checkpoint {
    /// Loads a Hugging Face directory or a `.gguf` file.
    ///
    /// Fails if a file cannot be read, if the architecture is not supported, or if tensors are missing, unknown or of
    /// another shape.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            hf::open(path)
        } else if path.extension().is_some_and(|e| e == "gguf") {
            gguf::open(path)
        } else {
            Err(Error::NotAModel { path: path.into() })
        }
    }

    /// Loads a model from memory; `name` takes the place of the path in errors.
    pub fn from_files(files: Files<'_>, name: &str) -> Result<Self> {
        hf::from_files(files, Path::new(name))
    }
}
