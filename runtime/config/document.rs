//! A parsed TOML document, with the lines of its keys.

use toml_edit::{Document as Parsed, Item, Table};

use super::problem::Problem;

/// Sections of a document, and the source that they were parsed from.
#[derive(Clone, Default)]
pub struct Document {
    source: String,
    root: Table,
}

impl Document {
    /// Parses a document; a syntax error is a problem with its line.
    pub fn parse(source: &str) -> Result<Self, Problem> {
        match Parsed::parse(source.to_string()) {
            Ok(parsed) => Ok(Self { source: source.into(), root: parsed.into_table() }),
            Err(e) => {
                let line = e.span().map_or(0, |s| line_of(source, s.start));
                Err(Problem { line, message: e.message().to_string() })
            }
        }
    }

    /// Other sections from the same source.
    pub fn with_root(&self, root: Table) -> Self {
        Self { source: self.source.clone(), root }
    }

    /// The sections.
    pub fn root(&self) -> &Table {
        &self.root
    }

    fn table(&self, section: &str) -> Option<&Table> {
        self.root.get(section).and_then(Item::as_table)
    }

    /// What is written for a key.
    pub fn item(&self, section: &str, key: &str) -> Option<&Item> {
        self.table(section)?.get(key)
    }

    /// Line of a key; 0 where it is not written.
    pub fn line(&self, section: &str, key: &str) -> usize {
        self.table(section).map_or(0, |table| self.line_in(table, key))
    }

    fn line_in(&self, table: &Table, key: &str) -> usize {
        table.key(key).and_then(|k| k.span()).map_or(0, |s| line_of(&self.source, s.start))
    }

    /// Line where an item begins; 0 where that is not known.
    pub fn line_of_item(&self, item: Option<std::ops::Range<usize>>) -> usize {
        item.map_or(0, |span| line_of(&self.source, span.start))
    }

    /// The sections' names and lines.
    pub fn sections(&self) -> Vec<(String, usize)> {
        let line = |section: &str, item: &Item| {
            item.span().map_or_else(|| self.line_in(&self.root, section), |s| self.line_of_item(Some(s)))
        };
        self.root.iter().map(|(section, item)| (section.to_string(), line(section, item))).collect()
    }

    /// A problem for every section and key that is not `known`, with what `hint` knows of the key, or the nearest name that
    /// is known.
    pub fn unknown(&self, known: &[(&'static str, &'static str)], hint: &dyn Fn(&str) -> String) -> Vec<Problem> {
        let mut found = Vec::new();
        for (section, item) in self.root.iter() {
            let keys: Vec<&str> = known.iter().filter(|(s, _)| *s == section).map(|(_, key)| *key).collect();
            if keys.is_empty() {
                let near = nearest(section, known.iter().map(|(s, _)| *s));
                let line =
                    item.span().map_or_else(|| self.line_in(&self.root, section), |s| self.line_of_item(Some(s)));
                found.push(Problem { line, message: format!("unknown section `[{section}]`{near}") });
                continue;
            }
            let Some(table) = item.as_table() else {
                let message = format!("`{section}` must be a section `[{section}]`");
                found.push(Problem { line: self.line_in(&self.root, section), message });
                continue;
            };
            for (key, _) in table.iter().filter(|(key, _)| !keys.contains(key)) {
                let near = match hint(key) {
                    hint if hint.is_empty() => nearest(key, keys.iter().copied()),
                    hint => hint,
                };
                let message = format!("unknown key `{section}.{key}`{near}");
                found.push(Problem { line: self.line_in(table, key), message });
            }
        }
        found
    }
}

fn line_of(source: &str, at: usize) -> usize {
    source[..at.min(source.len())].matches('\n').count() + 1
}

/// `; did you mean ...?` with the nearest of the known names, if one is near.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let best = known.map(|k| (strsim::damerau_levenshtein(name, k), k)).min();
    match best {
        Some((distance, k)) if distance <= 2.max(name.len() / 3) => format!("; did you mean `{k}`?"),
        _ => String::new(),
    }
}
