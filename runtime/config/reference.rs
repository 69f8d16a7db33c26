//! `docs/config.md`, written from the schema.

use std::fmt::Write;
use std::path::Path;

use toml_edit::Table;

use super::reader::Reader;
use super::schema;
use super::stages::Earlier;

/// The reference of all keys as Markdown.
pub fn markdown() -> String {
    let mut reader = Reader::new("", Table::new(), Earlier::default());
    schema::read(&mut reader, Path::new("."));
    let mut out = String::from(
        "# Configuration\n\nA job is one TOML file. Every key below has the default shown; an unknown key or a value out of \
         range is an error\nthat names its line. This page is made from the program (`REHEARSAL_BLESS=1 cargo test --test it docs`).\n\n\
         Several jobs that build on one another are one file with a `[[stage]]` for each: `algorithm`, `steps`, `seed` and\n\
         `name` of its own, and sections (`[stage.data]`, `[stage.loss]`, ...) whose keys take the place of the file's. A stage\n\
         works in its own folder of `job.directory`. Its policy is that of the last stage that trained one, and without rules\n\
         its reward is the last stage's reward model; `\"stage:NAME\"` names a stage's model wherever a model is named.\n",
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
