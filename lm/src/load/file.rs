//! Reading of a model's files.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use crate::error::{Error, Result};

/// Opens a file to read. One that is no regular file, such as a pipe, could be waited for without end.
pub fn open(path: &Path) -> Result<File> {
    let read = |source| Error::Read { path: path.into(), source };
    if !fs::metadata(path).map_err(read)?.is_file() {
        return Err(Error::Malformed { path: path.into(), reason: "it is not a regular file".into() });
    }
    File::open(path).map_err(read)
}

/// The whole content of a file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(|source| Error::Read { path: path.into(), source })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("model.safetensors");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let error = read(&pipe).unwrap_err().to_string();
        assert!(error.contains("not a regular file") && error.contains("model.safetensors"), "{error}");
    }
}
