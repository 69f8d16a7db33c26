//! Shards: content-addressed files of tensors beside the database, named by the blake3 hash of their bytes and shared
//! between checkpoints.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::IoContext;
use crate::{Error, Result};

const EXTENSION: &str = "safetensors";

pub struct Shards {
    directory: PathBuf,
}

impl Shards {
    pub fn open(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).at(directory)?;
        let shards = Self { directory: directory.into() };
        // Partial files of a killed process.
        for (path, name) in shards.files()? {
            if name.ends_with(".tmp") {
                fs::remove_file(&path).at(&path)?;
            }
        }
        Ok(shards)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn path(&self, hash: &str) -> PathBuf {
        self.directory.join(format!("{hash}.{EXTENSION}"))
    }

    /// Writes a shard unless it exists, and returns whether it was written. It is durable after [`Shards::sync`].
    pub fn write(&self, hash: &str, bytes: &[u8]) -> Result<bool> {
        let path = self.path(hash);
        if fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64) {
            return Ok(false);
        }
        write_durably(&path, bytes)?;
        Ok(true)
    }

    /// Makes the directory entries of written shards durable.
    pub fn sync(&self) -> Result<()> {
        File::open(&self.directory).and_then(|d| d.sync_all()).at(&self.directory)
    }

    /// Reads a shard and verifies its hash.
    pub fn read(&self, hash: &str) -> Result<Vec<u8>> {
        let path = self.path(hash);
        let corrupt = |reason: String| Error::Corrupt { what: path.display().to_string(), reason };
        let bytes = fs::read(&path).map_err(|e| corrupt(e.to_string()))?;
        if blake3::hash(&bytes).to_hex().as_str() != hash {
            return Err(corrupt("its content does not match its hash".into()));
        }
        Ok(bytes)
    }

    /// Deletes the shards whose hashes are not in `used`.
    pub fn remove_unused(&self, used: &BTreeSet<String>) -> Result<()> {
        for (path, name) in self.files()? {
            let hash = name.strip_suffix(&format!(".{EXTENSION}"));
            if hash.is_some_and(|h| !used.contains(h)) {
                fs::remove_file(&path).at(&path)?;
            }
        }
        Ok(())
    }

    /// Paths and names of the files in the directory, sorted.
    pub fn files(&self) -> Result<Vec<(PathBuf, String)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.directory).at(&self.directory)? {
            let path = entry.at(&self.directory)?.path();
            if let Some(name) = path.file_name().and_then(|n| n.to_str()).map(String::from) {
                all.push((path, name));
            }
        }
        all.sort();
        Ok(all)
    }
}

/// Writes a file atomically: to a temporary name, synced, then renamed.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    if let Err(e) = written {
        let _ = fs::remove_file(&temporary); // frees the space; the error of the write is returned
        return Err(e).at(path);
    }
    fs::rename(&temporary, path).at(path)
}
