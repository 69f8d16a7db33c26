//! Writes rows to a file: JSON Lines, or Parquet by the extension `.parquet`.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::Value;

use super::parquet;
use crate::error::{At, Result};

/// Writes rows to `file` atomically, through a temporary file beside it. For `-`, writes JSON Lines to `standard`.
pub fn write(rows: &[Value], file: &Path, standard: &mut dyn Write) -> Result<()> {
    let lines = |out: &mut dyn Write| rows.iter().try_for_each(|row| writeln!(out, "{row}")).and_then(|()| out.flush());
    if file == Path::new("-") {
        // A reader that has seen enough, such as `head`, is no error.
        return match lines(standard) {
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.at(file),
        };
    }
    let mut name = file.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = Path::new(&name);
    if file.extension().is_some_and(|e| e == "parquet") {
        parquet::write(rows, temporary)?;
    } else {
        lines(&mut std::io::BufWriter::new(File::create(temporary).at(temporary)?)).at(temporary)?;
    }
    std::fs::rename(temporary, file).at(file)
}
