//! `[[stage]]`: several jobs in one document. A stage is the document's sections with its own in their place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml_edit::{Item, Table};

use super::document::Document;
use super::problem::Problem;

/// One stage as a document of its own.
pub struct Stage {
    pub document: Document,
    /// Its folder in the chain's directory; none for a document without stages.
    pub name: Option<String>,
}

/// Keys of a stage that belong to `[job]`.
const JOB_KEYS: [&str; 3] = ["algorithm", "steps", "seed"];

/// The stages of a document, or the document itself.
pub fn split(source: &str) -> Result<Vec<Stage>, Vec<Problem>> {
    let document = Document::parse(source).map_err(|problem| vec![problem])?;
    let mut root = document.root().clone();
    let Some(item) = root.remove("stage") else { return Ok(vec![Stage { document, name: None }]) };
    let problem = |line: usize, message: &str| vec![Problem { line, message: message.into() }];
    let Item::ArrayOfTables(stages) = item else {
        return Err(problem(0, "`stage` must be written as `[[stage]]`, once for each stage"));
    };
    let mut all: Vec<Stage> = Vec::new();
    for (i, stage) in stages.iter().enumerate() {
        let line = document.line_of_item(stage.span());
        let text = |key: &str| stage.get(key).and_then(Item::as_str).map(String::from);
        let Some(algorithm) = text("algorithm") else {
            return Err(problem(line, "a stage needs `algorithm`"));
        };
        let name = text("name").unwrap_or(algorithm);
        if name.is_empty() || name.contains(['/', '\\', '.']) {
            return Err(problem(
                line,
                "a stage's `name` becomes a folder: it must not be empty, nor contain `/`, `\\` or `.`",
            ));
        }
        let name = format!("{:02}-{name}", i + 1);
        let mut merged = root.clone();
        for (key, item) in stage.iter().filter(|(key, _)| *key != "name") {
            if JOB_KEYS.contains(&key) {
                section(&mut merged, "job").insert(key, item.clone());
            } else if let Some(table) = item.as_table() {
                let target = section(&mut merged, key);
                table.iter().for_each(|(key, item)| drop(target.insert(key, item.clone())));
            } else {
                let message = format!(
                    "a stage has sections, `name`, and `algorithm`, `steps`, `seed` of `[job]`; `{key}` is none of them"
                );
                return Err(problem(line, &message));
            }
        }
        all.push(Stage { document: document.with_root(merged), name: Some(name) });
    }
    Ok(all)
}

fn section<'a>(root: &'a mut Table, name: &str) -> &'a mut Table {
    if !root.get(name).is_some_and(Item::is_table) {
        root.insert(name, Item::Table(Table::new()));
    }
    match root.get_mut(name) {
        Some(Item::Table(table)) => table,
        _ => unreachable!("a table was put there"),
    }
}

/// What earlier stages leave for the later ones.
#[derive(Debug, Clone, Default)]
pub struct Earlier {
    models: BTreeMap<String, PathBuf>,
    /// The model of the last stage that trains a policy.
    pub policy: Option<PathBuf>,
    /// The model of the last stage that trains a reward model.
    pub reward_model: Option<PathBuf>,
}

impl Earlier {
    /// The model of a stage by its name, with or without its number.
    pub fn model(&self, name: &str) -> Option<&PathBuf> {
        let named = |folder: &str| folder == name || folder.split_once('-').is_some_and(|(_, rest)| rest == name);
        self.models.iter().rev().find(|(folder, _)| named(folder)).map(|(_, path)| path)
    }

    /// Whether a path is the model of an earlier stage, which need not exist yet.
    pub fn has(&self, path: &Path) -> bool {
        self.models.values().any(|p| p == path)
    }

    /// Adds a stage's model.
    pub fn add(&mut self, stage: &str, model: PathBuf, is_reward_model: bool) {
        let kind = if is_reward_model { &mut self.reward_model } else { &mut self.policy };
        *kind = Some(model.clone());
        self.models.insert(stage.into(), model);
    }
}
