//! The reference of all keys as Markdown (`docs/config.md`) and as a JSON schema.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::keys::{Key, Keys, Kind};

/// The reference of all visited keys as Markdown.
pub fn markdown(keys: &Keys) -> String {
    let mut out = String::from(
        "# Configuration\n\nA job is one TOML file. Every key below has the default shown. An unknown key or a value out of \
         its range is an error\nthat names its line. A key marked † must keep its value when a job is resumed; files and models \
         are compared by content. This page\nis made from the program (`REHEARSAL_BLESS=1 cargo test --test it docs`).\n\n\
         Several jobs that build on one another are one file with a `[[stage]]` for each: `algorithm`, `steps`, `seed` and\n\
         `name` of its own, and sections (`[stage.data]`, `[stage.loss]`, ...) whose keys take the place of the file's. A stage\n\
         works in its own folder of `job.directory`. Its policy is that of the last stage that trained one, and without rules\n\
         its reward is the last stage's reward model; `\"stage:NAME\"` names a stage's model wherever a model is named.\n",
    );
    let cell = |text: &str| text.replace('|', "\\|");
    for (section, keys) in keys.by_section() {
        let _ =
            write!(out, "\n## [{section}]\n\n| key | default | values | what it does |\n| --- | --- | --- | --- |\n");
        for Key { name, default, values, help, effect, .. } in keys {
            let fixed = if *effect == super::Effect::Result { " †" } else { "" };
            let _ = writeln!(out, "| `{name}`{fixed} | {} | {} | {} |", cell(default), cell(values), cell(help));
        }
    }
    out
}

/// A JSON schema of a job's document, for editors that complete and check TOML.
pub fn json_schema(keys: &Keys) -> Value {
    let mut sections = Map::new();
    for (section, keys) in keys.by_section() {
        let properties: Map<String, Value> = keys.iter().map(|key| (key.name.to_string(), property(key))).collect();
        let value = json!({"type": "object", "additionalProperties": false, "properties": properties});
        sections.insert(section.into(), value);
    }
    let mut stage: Map<String, Value> = sections.clone();
    for key in ["name", "algorithm"] {
        stage.insert(key.into(), json!({"type": "string"}));
    }
    for key in ["steps", "seed"] {
        stage.insert(key.into(), json!({"type": "integer"}));
    }
    let stages = json!({
        "type": "array",
        "items": {"type": "object", "required": ["algorithm"], "additionalProperties": false, "properties": stage},
    });
    sections.insert("stage".into(), stages);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A job of Rehearsal",
        "type": "object",
        "required": ["job"],
        "additionalProperties": false,
        "properties": sections,
    })
}

fn property(key: &Key) -> Value {
    let mut property = match &key.kind {
        Kind::Number(range) => typed("number", range.json()),
        Kind::Integer(range) => typed("integer", range.json()),
        Kind::Flag => typed("boolean", Map::new()),
        Kind::Text => typed("string", Map::new()),
        Kind::Choice(names) => Map::from_iter([("enum".to_string(), json!(names))]),
        Kind::Texts => typed("array", Map::from_iter([("items".to_string(), json!({"type": "string"}))])),
        Kind::TextOrTexts => {
            let texts = json!({"type": "array", "items": {"type": "string"}});
            Map::from_iter([("anyOf".to_string(), json!([{"type": "string"}, texts]))])
        }
        Kind::Numbers => typed("array", Map::from_iter([("items".to_string(), json!({"type": "number"}))])),
    };
    property.insert("description".into(), key.help.into());
    // Defaults are written as TOML, which for these kinds is JSON too.
    if let Ok(default) = serde_json::from_str::<Value>(&key.default) {
        property.insert("default".into(), default);
    }
    property.into()
}

fn typed(name: &str, mut more: Map<String, Value>) -> Map<String, Value> {
    more.insert("type".into(), name.into());
    more
}
