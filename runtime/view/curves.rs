//! The numbers of a job's steps, read from its history, with at most so many steps in memory.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::path::Path;

use serde_json::Value;

/// Steps that are kept at most. Beyond, every second is dropped.
const STEPS_MAX: usize = 4096;
/// Bytes read at a time at most.
const BYTES_MAX: u64 = 64 << 20;

/// Lines of a history: every `stride`-th step.
pub struct Curves {
    stride: u64,
    lines: Vec<Value>,
    /// Bytes of the file that were read, and what they were of.
    read: u64,
    file: Option<FileId>,
}

/// Tells a file from one that took its place.
type FileId = (u64, u64);

impl Default for Curves {
    fn default() -> Self {
        Self { stride: 1, lines: Vec::new(), read: 0, file: None }
    }
}

impl Curves {
    /// Reads what was appended since the last call; all of it if the file was replaced, as a resumed job does. A file that does
    /// not exist is empty.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn refresh(&mut self, path: &Path) -> io::Result<()> {
        let mut file = match File::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                *self = Self::default();
                return Ok(());
            }
            file => file?,
        };
        let metadata = file.metadata()?;
        let id = identity(&metadata);
        if self.file != Some(id) || metadata.len() < self.read {
            *self = Self { file: Some(id), ..Self::default() };
        }
        file.seek(SeekFrom::Start(self.read))?;
        let mut reader = BufReader::new(io::Read::take(file, BYTES_MAX));
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line)?;
            // A line without its end is still being written.
            if n == 0 || !line.ends_with(b"\n") {
                return Ok(());
            }
            self.read += n as u64;
            if let Ok(row) = serde_json::from_slice(&line) {
                self.add(row);
            }
        }
    }

    /// Adds the line of a step. A damaged line has none, and is left out.
    fn add(&mut self, row: Value) {
        let Some(step) = row["step"].as_u64() else { return };
        if !step.is_multiple_of(self.stride) {
            return;
        }
        self.lines.push(row);
        if self.lines.len() > STEPS_MAX {
            self.stride *= 2;
            let stride = self.stride;
            self.lines.retain(|row| row["step"].as_u64().is_some_and(|step| step.is_multiple_of(stride)));
        }
    }

    /// Only every so many-th step is kept.
    pub fn stride(&self) -> u64 {
        self.stride
    }

    /// The lines of the steps after one.
    pub fn after(&self, step: u64) -> &[Value] {
        let first = self.lines.partition_point(|row| row["step"].as_u64() <= Some(step));
        &self.lines[first..]
    }
}

#[cfg(unix)]
fn identity(metadata: &std::fs::Metadata) -> FileId {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn identity(_: &std::fs::Metadata) -> FileId {
    (0, 0)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use serde_json::json;

    use super::*;

    fn steps(curves: &Curves, after: u64) -> Vec<u64> {
        curves.after(after).iter().map(|row| row["step"].as_u64().unwrap()).collect()
    }

    #[test]
    fn lines_are_read_once_they_are_whole_and_again_when_the_file_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("history.jsonl");
        let mut curves = Curves::default();
        curves.refresh(&path).unwrap();
        assert!(curves.after(0).is_empty());
        fs::write(&path, "{\"step\":1,\"kl\":0.5}\nnot json\n{\"kl\":1}\n{\"step\":2,\"kl").unwrap();
        curves.refresh(&path).unwrap();
        assert_eq!(steps(&curves, 0), [1]);
        let mut file = File::options().append(true).open(&path).unwrap();
        writeln!(file, "\":0.25}}\n{{\"step\":3}}").unwrap();
        curves.refresh(&path).unwrap();
        assert_eq!((steps(&curves, 0), steps(&curves, 2)), (vec![1, 2, 3], vec![3]));
        assert_eq!(curves.after(1)[0]["kl"], json!(0.25));
        // A resumed job drops the lines after its checkpoint by putting another file in its place.
        let other = folder.path().join("other");
        fs::write(&other, "{\"step\":1}\n").unwrap();
        fs::rename(&other, &path).unwrap();
        curves.refresh(&path).unwrap();
        assert_eq!(steps(&curves, 0), [1]);
    }

    #[test]
    fn long_histories_are_thinned() {
        let mut curves = Curves::default();
        (1..=20_000u64).for_each(|step| curves.add(json!({"step": step})));
        assert_eq!(curves.stride(), 8);
        let kept = steps(&curves, 0);
        assert!(kept.len() <= STEPS_MAX && kept.windows(2).all(|w| w[1] == w[0] + 8), "{}", kept.len());
        assert_eq!(kept.last(), Some(&20_000));
    }
}
