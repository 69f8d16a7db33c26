//! `docs/config.md`, written from the schema.

use std::fmt::Write;
use std::path::Path;

use super::reader::Reader;
use super::schema;

/// The reference of all keys as Markdown.
pub fn markdown() -> String {
    let mut reader = Reader::new("");
    schema::read(&mut reader, Path::new("."));
    let mut out = String::from(
        "# Configuration\n\nA job is one TOML file. Every key below has the default shown; an unknown key or a value out of \
         range is an error\nthat names its line. This page is made from the program (`REHEARSAL_BLESS=1 cargo test --test it docs`).\n",
    );
    let mut section = "";
    for doc in &reader.docs {
        if doc.section != section {
            section = doc.section;
            let _ =
                write!(out, "\n## [{section}]\n\n| key | default | values | what it is |\n| --- | --- | --- | --- |\n");
        }
        let cell = |text: &str| text.replace('|', "\\|");
        let _ =
            writeln!(out, "| `{}` | {} | {} | {} |", doc.key, cell(&doc.default), cell(&doc.values), cell(doc.help));
    }
    out
}
