//! In place of Parquet files, in a build without the feature `parquet`.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::features::PARQUET;

fn absent<T>(file: &Path) -> Result<T> {
    Err(Error::Prompts { file: file.into(), message: format!("needs {PARQUET}") })
}

/// Fails.
pub fn read(file: &Path) -> Result<std::iter::Empty<Result<Value>>> {
    absent(file)
}

/// Fails.
pub fn write(_: &[Value], file: &Path) -> Result<()> {
    absent(file)
}
