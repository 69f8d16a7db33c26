//! Parquet files, read and written as JSON rows.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_json::ReaderBuilder;
use arrow_json::reader::infer_json_schema_from_iterator;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::SerializedFileReader;
use serde_json::{Value, json};

use crate::error::{At, Error, Result};

/// The rows of a file, in order.
pub fn read(file: &Path) -> Result<impl Iterator<Item = Result<Value>> + use<>> {
    let path = file.to_path_buf();
    let wrong = |path: &Path, e: parquet::errors::ParquetError| Error::Prompts {
        file: path.into(),
        message: format!("is no readable Parquet file: {e}"),
    };
    let reader = SerializedFileReader::new(File::open(file).at(file)?).map_err(|e| wrong(&path, e))?;
    Ok(reader.into_iter().map(move |row| Ok(row.map_err(|e| wrong(&path, e))?.to_json_value())))
}

/// Writes rows to a file. Columns get the types that all rows agree on.
pub fn write(rows: &[Value], file: &Path) -> Result<()> {
    let wrong = |reason: String| Error::Prompts { file: file.into(), message: format!("cannot be written: {reason}") };
    let rows = with_uniform_types(rows);
    let schema = infer_json_schema_from_iterator(rows.iter().map(Ok)).map_err(|e| wrong(e.to_string()))?;
    let schema = Arc::new(schema);
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let mut writer = ArrowWriter::try_new(File::create(file).at(file)?, schema.clone(), Some(properties))
        .map_err(|e| wrong(e.to_string()))?;
    let mut decoder = ReaderBuilder::new(schema).build_decoder().map_err(|e| wrong(e.to_string()))?;
    for part in rows.chunks(1024) {
        decoder.serialize(part).map_err(|e| wrong(e.to_string()))?;
        while let Some(batch) = decoder.flush().map_err(|e| wrong(e.to_string()))? {
            writer.write(&batch).map_err(|e| wrong(e.to_string()))?;
        }
    }
    writer.close().map(drop).map_err(|e| wrong(e.to_string()))
}

/// Gives each column one type, as Parquet needs: if any prompt is a conversation, all prompts and completions become
/// ones.
fn with_uniform_types(rows: &[Value]) -> Vec<Value> {
    if !rows.iter().any(|row| row["prompt"].is_array()) {
        return rows.to_vec();
    }
    let message = |role: &str, text: &Value| json!([{"role": role, "content": text}]);
    let one = |row: &Value| {
        let mut row = row.clone();
        for (column, role) in
            [("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"), ("completion", "assistant")]
        {
            if row[column].is_string() {
                row[column] = message(role, &row[column]);
            }
        }
        row
    };
    rows.iter().map(one).collect()
}
