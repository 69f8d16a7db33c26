//! The sentinel: a file with the number of the last acknowledged write, by which the loss of the journal's tail is found
//! out.
//!
//! It holds the number (8 bytes, big-endian) and the first 8 bytes of its blake3 hash. Builds before version 0.2 wrote the
//! number alone. It is written after the journal and not synced: after a power loss it may be behind, never ahead.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::IoContext;
use crate::files::{Files, Slot};
use crate::{Repair, Result};

pub struct Sentinel {
    path: PathBuf,
    slot: Box<dyn Slot>,
}

impl Sentinel {
    /// Opens or creates the sentinel of a directory, and returns the number in it; 0 for a new one.
    pub fn open(directory: &Path, files: Arc<dyn Files>, repairs: &mut Vec<Repair>) -> Result<(Self, u64)> {
        let path = directory.join("store.sentinel");
        let slot = files.slot(&path).at(&path)?;
        let bytes = files.read(&path).at(&path)?;
        let number = read(&bytes).unwrap_or_else(|| {
            let path = path.display();
            repairs.push(Repair(format!("{path} is damaged: whether the last records are lost cannot be told")));
            0
        });
        Ok((Self { path, slot }, number))
    }

    /// Writes a number.
    pub fn write(&self, number: u64) -> Result<()> {
        let number = number.to_be_bytes();
        self.slot.write(&[number, checksum(number)].concat()).at(&self.path)
    }
}

/// The number in a file; `None` if it is damaged.
fn read(bytes: &[u8]) -> Option<u64> {
    let (number, sum) = match bytes.len() {
        0 => return Some(0),
        8 | 16 => bytes.split_at(8),
        _ => return None,
    };
    let number: [u8; 8] = number.try_into().ok()?;
    (sum.is_empty() || *sum == checksum(number)).then(|| u64::from_be_bytes(number))
}

fn checksum(number: [u8; 8]) -> [u8; 8] {
    let mut sum = [0; 8];
    sum.copy_from_slice(&blake3::hash(&number).as_bytes()[..8]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Disk;

    #[test]
    fn numbers_are_kept_old_files_read_and_damage_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let mut repairs = Vec::new();
        let mut open = || Sentinel::open(directory.path(), Arc::new(Disk), &mut repairs).unwrap();
        let (sentinel, number) = open();
        assert_eq!(number, 0);
        sentinel.write(7).unwrap();
        assert_eq!(open().1, 7);
        std::fs::write(&sentinel.path, 9u64.to_be_bytes()).unwrap();
        assert_eq!(open().1, 9);
        sentinel.write(7).unwrap();
        let mut bytes = std::fs::read(&sentinel.path).unwrap();
        bytes[7] ^= 1;
        std::fs::write(&sentinel.path, bytes).unwrap();
        assert_eq!(open().1, 0);
        assert_eq!(repairs.len(), 1);
        assert!(repairs[0].0.contains("is damaged"), "{repairs:?}");
    }
}
