//! Shards: content-addressed files of tensors beside the database, named by the blake3 hash of their bytes and shared
//! between checkpoints.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::IoContext;
use crate::files::{Files, TEMPORARY, replace};
use crate::{Error, Result};

const EXTENSION: &str = ".safetensors";

pub struct Shards {
    directory: PathBuf,
    files: Arc<dyn Files>,
}

impl Shards {
    pub fn open(directory: &Path, files: Arc<dyn Files>) -> Result<Self> {
        files.create_directory(directory).at(directory)?;
        let shards = Self { directory: directory.into(), files };
        // Partial files of a killed process.
        for name in shards.names()? {
            if name.ends_with(TEMPORARY) {
                shards.remove(&name)?;
            }
        }
        Ok(shards)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn shard(&self, hash: &str) -> PathBuf {
        self.path(&format!("{hash}{EXTENSION}"))
    }

    /// Writes a shard unless it is there undamaged, and returns whether it was written. It is durable after
    /// [`Shards::sync`].
    pub fn write(&self, hash: &str, bytes: &[u8]) -> Result<bool> {
        let path = self.shard(hash);
        // Damage since an earlier checkpoint wrote it is mended here.
        if self.files.read(&path).is_ok_and(|known| known == bytes) {
            return Ok(false);
        }
        replace(&*self.files, &path, bytes).at(&path)?;
        Ok(true)
    }

    /// Writes a file that is not a shard, and need not survive a power loss.
    pub fn write_named(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(name);
        self.files.write_lazily(&path, bytes).at(&path)
    }

    /// Reads a file that is not a shard.
    pub fn read_named(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path(name);
        self.files.read(&path).at(&path)
    }

    /// Makes the names of written files durable.
    pub fn sync(&self) -> Result<()> {
        self.files.sync_directory(&self.directory).at(&self.directory)
    }

    /// Reads a shard and verifies its hash.
    pub fn read(&self, hash: &str) -> Result<Vec<u8>> {
        let path = self.shard(hash);
        let corrupt = |reason: String| Error::Corrupt { what: path.display().to_string(), reason };
        let bytes = match self.files.read(&path) {
            // Any other error may pass: the system has too few handles, say.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(corrupt(e.to_string())),
            bytes => bytes.at(&path)?,
        };
        if blake3::hash(&bytes).to_hex().as_str() != hash {
            return Err(corrupt("its content does not match its hash".into()));
        }
        Ok(bytes)
    }

    /// Deletes the shards whose hashes are not in `used`.
    pub fn remove_unused(&self, used: &BTreeSet<String>) -> Result<()> {
        for name in self.names()? {
            if name.strip_suffix(EXTENSION).is_some_and(|hash| !used.contains(hash)) {
                self.remove(&name)?;
            }
        }
        Ok(())
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        self.files.remove(&path).at(&path)
    }

    /// Names of the files in the directory, sorted.
    pub fn names(&self) -> Result<Vec<String>> {
        self.files.list(&self.directory).at(&self.directory)
    }
}
