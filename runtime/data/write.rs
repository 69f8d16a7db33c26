//! Rows into files: JSON Lines, or Parquet by the file's ending.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use arrow_json::ReaderBuilder;
use arrow_json::reader::infer_json_schema_from_iterator;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};

use crate::error::{At, Error, Result};

/// Writes rows in one go: a reader finds the old file or the new one. `-` is standard output's, in JSON Lines.
pub fn write(rows: &[Value], file: &Path, standard: &mut dyn Write) -> Result<()> {
    let lines = |out: &mut dyn Write| rows.iter().try_for_each(|row| writeln!(out, "{row}")).and_then(|()| out.flush());
    if file == Path::new("-") {
        return lines(standard).at(file);
    }
    let mut name = file.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = Path::new(&name);
    if file.extension().is_some_and(|e| e == "parquet") {
        parquet(rows, temporary)?;
    } else {
        lines(&mut std::io::BufWriter::new(File::create(temporary).at(temporary)?)).at(temporary)?;
    }
    std::fs::rename(temporary, file).at(file)
}

fn parquet(rows: &[Value], file: &Path) -> Result<()> {
    let wrong = |reason: String| Error::Prompts { file: file.into(), message: format!("cannot be written: {reason}") };
    let rows = alike(rows);
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

/// A column has one type: where one prompt is a conversation, all are, and what answers them with them.
fn alike(rows: &[Value]) -> Vec<Value> {
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
