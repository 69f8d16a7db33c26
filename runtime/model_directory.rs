//! A trained model's Hugging Face directory, which is there as a whole: the earlier one, none, or the new one.

use std::fs;
use std::path::{Path, PathBuf};

use rehearsal_store::{beside, replace_directory};

use crate::error::{At, Error, Result};

/// Where a model is written before it takes its place.
pub struct Writing {
    directory: PathBuf,
    temporary: PathBuf,
}

impl Writing {
    /// Begins to write a model's directory.
    ///
    /// # Errors
    ///
    /// [`Error::NotAModelDirectory`] if something else is there.
    pub fn begin(directory: &Path) -> Result<Self> {
        if let Ok(mut files) = fs::read_dir(directory) {
            let is_model = ["config.json", "adapter"].iter().any(|name| directory.join(name).exists());
            if !is_model && files.next().is_some() {
                return Err(Error::NotAModelDirectory(directory.into()));
            }
        }
        let temporary = beside(directory);
        if temporary.exists() {
            fs::remove_dir_all(&temporary).at(&temporary)?; // what a killed process has left
        }
        Ok(Self { directory: directory.into(), temporary })
    }

    /// The directory to write to.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Puts what was written in its place, durably.
    pub fn end(self) -> Result<()> {
        replace_directory(&self.temporary, &self.directory).at(&self.directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_replaces_a_model_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("model");
        for version in ["1", "2"] {
            let writing = Writing::begin(&directory).unwrap();
            fs::create_dir(writing.path()).unwrap();
            fs::write(writing.path().join("config.json"), version).unwrap();
            writing.end().unwrap();
            assert_eq!(fs::read_to_string(directory.join("config.json")).unwrap(), version);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        fs::write(folder.path().join("letters.txt"), "dear").unwrap();
        assert!(matches!(Writing::begin(folder.path()), Err(Error::NotAModelDirectory(_))));
    }
}
