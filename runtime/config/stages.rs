//! `[[stage]]`: several jobs in one file. A stage is the file's sections with its own in their place.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml_edit::{Item, Table};

use super::Config;
use super::methods::Algorithm;
use super::reader::{Problem, line_of};
use crate::job::MODEL_FOLDER;

/// One stage as a document of its own.
pub struct Stage {
    pub root: Table,
    /// Its folder in the chain's directory; none for a file without stages.
    pub name: Option<String>,
}

/// Keys of a stage that belong to `[job]`.
const JOB_KEYS: [&str; 3] = ["algorithm", "steps", "seed"];

/// The stages of a document, or the document itself.
pub fn split(mut root: Table, source: &str) -> Result<Vec<Stage>, Vec<Problem>> {
    let Some(item) = root.remove("stage") else { return Ok(vec![Stage { root, name: None }]) };
    let problem = |line: usize, message: &str| vec![Problem { line, message: message.into() }];
    let Item::ArrayOfTables(stages) = item else {
        return Err(problem(0, "`stage` must be written as `[[stage]]`, once for each stage"));
    };
    let mut all: Vec<Stage> = Vec::new();
    for (i, stage) in stages.iter().enumerate() {
        let line = stage.span().map_or(0, |s| line_of(source, s.start));
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
        all.push(Stage { root: merged, name: Some(name) });
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
    /// The language model of the last stage that trains one.
    pub policy: Option<PathBuf>,
    pub reward_model: Option<PathBuf>,
}

impl Earlier {
    /// The model of a stage by its name, with or without its number.
    pub fn model(&self, name: &str) -> Option<&PathBuf> {
        let named = |folder: &str| folder == name || folder.split_once('-').is_some_and(|(_, rest)| rest == name);
        self.models.iter().rev().find(|(folder, _)| named(folder)).map(|(_, path)| path)
    }

    /// Whether a path is the model of an earlier stage, which need not exist yet.
    pub fn has(&self, path: &std::path::Path) -> bool {
        self.models.values().any(|p| p == path)
    }

    pub fn add(&mut self, name: &str, config: &Config) {
        let path = config.job.directory.join(MODEL_FOLDER);
        match config.job.algorithm {
            Algorithm::RewardModel => self.reward_model = Some(path.clone()),
            _ => self.policy = Some(path.clone()),
        }
        self.models.insert(name.into(), path);
    }
}
