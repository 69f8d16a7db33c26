//! Parquet files, read and written as JSON rows.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use arrow_json::ReaderBuilder;
use arrow_json::reader::infer_json_schema_from_iterator;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use serde_json::{Value, json};

use crate::error::{At, Error, Result};

/// Bytes that a group of rows may have when it is decompressed. A page, by its format, has 2 GiB at most.
const ROW_GROUP_MAX: i64 = 4 << 30;

/// The rows of a file, in order.
pub fn read(file: &Path) -> Result<impl Iterator<Item = Result<Value>> + use<>> {
    rows(file, ROW_GROUP_MAX)
}

fn rows(file: &Path, row_group_max: i64) -> Result<impl Iterator<Item = Result<Value>> + use<>> {
    let path = file.to_path_buf();
    let wrong = |path: &Path, e: parquet::errors::ParquetError| Error::Prompts {
        file: path.into(),
        message: format!("is no readable Parquet file: {e}"),
    };
    let reader = SerializedFileReader::new(File::open(file).at(file)?).map_err(|e| wrong(&path, e))?;
    if let Some(group) = reader.metadata().row_groups().iter().find(|group| group.total_byte_size() > row_group_max) {
        let message = format!(
            "has a group of {} rows with {} bytes when decompressed; at most {row_group_max} are read at a time: write it with \
             smaller groups of rows",
            group.num_rows(),
            group.total_byte_size()
        );
        return Err(Error::Prompts { file: path, message });
    }
    // The library panics on these.
    let columns = reader.metadata().row_groups().iter().flat_map(|group| group.columns());
    let negative = |n: &i64| *n < 0;
    for column in columns {
        let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        if let Some(n) = [start, column.compressed_size(), column.num_values()].into_iter().find(negative) {
            let message =
                format!("is no readable Parquet file: column `{}` has the offset or size {n}", column.column_path());
            return Err(Error::Prompts { file: path, message });
        }
    }
    let mut rows = reader.into_iter();
    let mut broken = false;
    let next = move || {
        if broken {
            return None;
        }
        // What the library does not check ends the file, not the program.
        let row = catch_unwind(AssertUnwindSafe(|| rows.next()));
        broken = !matches!(row, Ok(Some(Ok(_))));
        match row {
            Ok(row) => row.map(|row| Ok(row.map_err(|e| wrong(&path, e))?.to_json_value())),
            Err(_) => {
                let message = "is no readable Parquet file: the library that reads it gave up".into();
                Some(Err(Error::Prompts { file: path.clone(), message }))
            }
        }
    };
    Ok(std::iter::from_fn(next))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_that_the_library_panics_on_are_an_error() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/rows_parquet/negative_offset");
        let error = read(&file).err().expect("an error").to_string();
        assert!(error.contains("column `") && error.contains("offset or size -"), "{error}");
    }

    #[test]
    fn a_group_that_grows_too_large_is_refused_before_it_is_decompressed() {
        let file = tempfile::NamedTempFile::with_suffix(".parquet").unwrap();
        write(&[json!({"prompt": "a".repeat(1 << 20)})], file.path()).unwrap();
        assert!(file.as_file().metadata().unwrap().len() < 1 << 18, "it is compressed");
        assert_eq!(rows(file.path(), 1 << 22).unwrap().count(), 1);
        let error = rows(file.path(), 1 << 19).err().expect("an error").to_string();
        assert!(error.contains("smaller groups of rows"), "{error}");
    }
}
