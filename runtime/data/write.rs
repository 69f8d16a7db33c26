//! Writes rows to a file: JSON Lines, or Parquet by the extension `.parquet`.

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

/// Writes rows to `file` atomically, through a temporary file beside it. For `-`, writes JSON Lines to `standard`.
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
