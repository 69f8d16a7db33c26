//! Reads models, whatever the format of their files.

use std::path::Path;

use super::checkpoint::{Checkpoint, Files};
use super::{gguf, hf};
use crate::error::{Error, Result};

impl Checkpoint {
    /// Reads a Hugging Face directory or a `.gguf` file.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            hf::open(path)
        } else if path.extension().is_some_and(|e| e == "gguf") {
            gguf::open(path)
        } else {
            Err(Error::NotAModel { path: path.into() })
        }
    }

    /// Reads a model from memory; `name` stands for the path in errors.
    pub fn from_files(files: Files<'_>, name: &str) -> Result<Self> {
        hf::from_files(files, Path::new(name))
    }
}
