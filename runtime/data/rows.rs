//! Rows of a file (JSON Lines, or Parquet by the extension `.parquet`) or of a directory's ledger.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use super::ledger::{self, Shape};
use super::parquet;
use crate::error::{At, Error, Result};

/// One row.
pub struct Row {
    /// Object of columns. A line that is no JSON is a string with the reason instead, which begins with `is no JSON`.
    pub columns: Value,
    /// Place in the file, for messages: `line 7` or `row 7`.
    pub place: String,
    /// Index in the file, from 0; blank lines count.
    pub index: u64,
}

/// Opens a file or a directory's ledger and iterates over its rows. `shape` is the kind of rows to read from a ledger.
pub fn open(file: &Path, shape: Shape) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    if ledger::is_ledger(file) {
        return Ok(Box::new(ledger::read(file, shape)?.into_iter().map(Ok)));
    }
    match file.extension().and_then(|e| e.to_str()) {
        Some("parquet") => parquet_rows(file),
        Some(table @ ("csv" | "tsv")) => Err(wrong(
            file,
            format!(
                "is {}; rows are read from JSON Lines and Parquet. To convert it: `python3 -c \"import csv, json, sys; \
                 [print(json.dumps(row)) for row in csv.DictReader(open(sys.argv[1]){})]\" FILE > FILE.jsonl`",
                table.to_uppercase(),
                if table == "tsv" { ", delimiter='\\t'" } else { "" }
            ),
        )),
        _ if is_array(file)? => Err(wrong(
            file,
            "is one JSON array; rows are read one object a line. To convert it: `jq -c '.[]' FILE > FILE.jsonl`".into(),
        )),
        _ => json_lines(file),
    }
}

fn wrong(file: &Path, message: String) -> Error {
    Error::Prompts { file: file.into(), message }
}

/// Whether a file begins as a JSON array does.
fn is_array(file: &Path) -> Result<bool> {
    let mut start = [0; 1024];
    let read = File::open(file).at(file)?.read(&mut start).at(file)?;
    Ok(start[..read].trim_ascii_start().first() == Some(&b'['))
}

fn json_lines(file: &Path) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    let path = file.to_path_buf();
    let lines = BufReader::new(File::open(file).at(file)?).lines().enumerate();
    Ok(Box::new(lines.filter_map(move |(index, line)| {
        let line = match line.at(&path) {
            Ok(line) => line,
            Err(e) => return Some(Err(e)),
        };
        if line.trim().is_empty() {
            return None;
        }
        let columns = serde_json::from_str(&line).unwrap_or_else(|e| Value::String(format!("is no JSON: {e}")));
        Some(Ok(Row { columns, place: format!("line {}", index + 1), index: index as u64 }))
    })))
}

fn parquet_rows(file: &Path) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    let rows = parquet::read(file)?.enumerate();
    Ok(Box::new(rows.map(|(index, columns)| {
        Ok(Row { columns: columns?, place: format!("row {}", index + 1), index: index as u64 })
    })))
}
