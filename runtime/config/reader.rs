//! Reads a TOML document key by key: every problem is kept with its line, every key with its description.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml_edit::{Document, Item, Table};

use super::stages::Earlier;

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1; 0 where there is none.
    pub line: usize,
    pub message: String,
}

/// All that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub file: PathBuf,
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.problems.len();
        write!(f, "{}: {n} problem{}", self.file.display(), if n == 1 { "" } else { "s" })?;
        for problem in &self.problems {
            write!(f, "\n  ")?;
            if problem.line > 0 {
                write!(f, "line {}: ", problem.line)?;
            }
            write!(f, "{}", problem.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// What the reference says of a key.
#[derive(Debug, Clone)]
pub struct KeyDoc {
    pub section: &'static str,
    pub key: &'static str,
    pub default: String,
    pub values: String,
    pub help: &'static str,
}

/// Parses a document; a syntax error is a problem with its line.
pub fn parse(source: &str) -> Result<Table, Problem> {
    Document::parse(source.to_string()).map(Document::into_table).map_err(|e| {
        let line = e.span().map_or(0, |s| line_of(source, s.start));
        Problem { line, message: e.message().to_string() }
    })
}

/// Reads one document.
pub struct Reader {
    source: String,
    root: Table,
    pub problems: Vec<Problem>,
    pub docs: Vec<KeyDoc>,
    /// What earlier stages leave behind.
    pub earlier: Earlier,
    read: BTreeMap<&'static str, Vec<&'static str>>,
}

impl Reader {
    /// Reads the sections of a document that was parsed from `source`.
    pub fn new(source: &str, root: Table, earlier: Earlier) -> Self {
        Self { source: source.into(), root, problems: Vec::new(), docs: Vec::new(), earlier, read: BTreeMap::new() }
    }

    /// A section, which may be absent.
    pub fn section(&mut self, name: &'static str) -> Section<'_> {
        self.read.entry(name).or_default();
        Section { reader: self, name }
    }

    /// Names every section and key that was not asked for.
    pub fn finish(&mut self) {
        let mut found = Vec::new();
        for (section, item) in self.root.iter() {
            let line =
                |t: &Table, key: &str| t.key(key).and_then(|k| k.span()).map_or(0, |s| line_of(&self.source, s.start));
            let Some(keys) = self.read.get(section) else {
                let near = nearest(section, self.read.keys().copied());
                let line = item.span().map_or_else(|| line(&self.root, section), |s| line_of(&self.source, s.start));
                found.push(Problem { line, message: format!("unknown section `[{section}]`{near}") });
                continue;
            };
            let Some(table) = item.as_table() else {
                let message = format!("`{section}` must be a section `[{section}]`");
                found.push(Problem { line: line(&self.root, section), message });
                continue;
            };
            for (key, _) in table.iter().filter(|(key, _)| !keys.contains(key)) {
                let near = nearest(key, keys.iter().copied());
                found.push(Problem { line: line(table, key), message: format!("unknown key `{section}.{key}`{near}") });
            }
        }
        self.problems.extend(found);
        self.problems.sort_by_key(|p| p.line);
    }
}

pub fn line_of(source: &str, at: usize) -> usize {
    source[..at.min(source.len())].matches('\n').count() + 1
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let best = known.map(|k| (strsim::damerau_levenshtein(name, k), k)).min();
    match best {
        Some((distance, k)) if distance <= 2.max(name.len() / 3) => format!("; did you mean `{k}`?"),
        _ => String::new(),
    }
}

/// A range that a number must lie in.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    min: f64,
    max: f64,
    open: bool,
}

impl Range {
    /// `min` or more.
    pub const fn from(min: f64) -> Self {
        Self { min, max: f64::INFINITY, open: false }
    }

    /// More than `min`.
    pub const fn above(min: f64) -> Self {
        Self { min, max: f64::INFINITY, open: true }
    }

    /// `min` to `max`, both included.
    pub const fn within(min: f64, max: f64) -> Self {
        Self { min, max, open: false }
    }

    /// Above `min`, `max` included.
    pub const fn above_to(min: f64, max: f64) -> Self {
        Self { min, max, open: true }
    }

    fn holds(&self, x: f64) -> bool {
        x.is_finite() && x <= self.max && if self.open { x > self.min } else { x >= self.min }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let low = if self.open { format!("above {}", self.min) } else { format!("{} or more", self.min) };
        match self.max {
            f64::INFINITY => f.write_str(&low),
            max if self.open => write!(f, "{low}, up to {max}"),
            max => write!(f, "{} to {max}", self.min),
        }
    }
}

/// One section being read.
pub struct Section<'a> {
    reader: &'a mut Reader,
    name: &'static str,
}

impl Section<'_> {
    fn take(
        &mut self,
        key: &'static str,
        default: impl fmt::Display,
        values: impl fmt::Display,
        help: &'static str,
    ) -> Option<Item> {
        let doc = KeyDoc { section: self.name, key, default: default.to_string(), values: values.to_string(), help };
        self.reader.docs.push(doc);
        self.reader.read.entry(self.name).or_default().push(key);
        self.reader.root.get(self.name)?.as_table()?.get(key).cloned()
    }

    /// What earlier stages leave behind.
    pub fn earlier(&self) -> &Earlier {
        &self.reader.earlier
    }

    /// Whether a key is written in the file.
    pub fn has(&self, key: &str) -> bool {
        self.reader.root.get(self.name).and_then(Item::as_table).is_some_and(|t| t.contains_key(key))
    }

    /// Notes a problem at a key.
    pub fn problem(&mut self, key: &str, message: impl fmt::Display) {
        let table = self.reader.root.get(self.name).and_then(Item::as_table);
        let span = table.and_then(|t| t.key(key)).and_then(|k| k.span());
        let line = span.map_or(0, |s| line_of(&self.reader.source, s.start));
        self.reader.problems.push(Problem { line, message: format!("`{}.{key}` {message}", self.name) });
    }

    fn wrong(&mut self, key: &str, item: &Item, wanted: impl fmt::Display) {
        let given = item.to_string();
        self.problem(key, format!("= {} must be {wanted}", given.trim()));
    }

    pub fn number(&mut self, key: &'static str, default: f64, range: Range, help: &'static str) -> f64 {
        let Some(item) = self.take(key, format!("{default:?}"), range, help) else { return default };
        let value = item.as_float().or(item.as_integer().map(|n| n as f64));
        self.in_range(key, &item, value, range, "a number").unwrap_or(default)
    }

    pub fn integer(&mut self, key: &'static str, default: u64, range: Range, help: &'static str) -> u64 {
        let Some(item) = self.take(key, default, range, help) else { return default };
        // The range is checked on a float; the number itself stays whole.
        let value = item.as_integer();
        let holds = self.in_range(key, &item, value.map(|n| n as f64), range, "a whole number").is_some();
        value.filter(|_| holds).map_or(default, |n| n as u64)
    }

    /// The value, if there is one and it lies in the range; else the problem is noted.
    fn in_range(&mut self, key: &str, item: &Item, value: Option<f64>, range: Range, kind: &str) -> Option<f64> {
        match value {
            Some(x) if range.holds(x) => return Some(x),
            Some(_) => self.wrong(key, item, range),
            None => self.wrong(key, item, kind),
        }
        None
    }

    pub fn flag(&mut self, key: &'static str, default: bool, help: &'static str) -> bool {
        let Some(item) = self.take(key, default, "true or false", help) else { return default };
        item.as_bool().unwrap_or_else(|| {
            self.wrong(key, &item, "true or false");
            default
        })
    }

    /// A text that may be absent.
    pub fn text(&mut self, key: &'static str, values: &'static str, help: &'static str) -> Option<String> {
        let item = self.take(key, "none", values, help)?;
        match item.as_str() {
            Some(text) => Some(text.to_string()),
            None => {
                self.wrong(key, &item, "a text in quotes");
                None
            }
        }
    }

    /// A text that must be there.
    pub fn needed(&mut self, key: &'static str, values: &'static str, help: &'static str) -> String {
        let missing = !self.has(key);
        let text = self.text(key, values, help);
        if let Some(doc) = self.reader.docs.last_mut() {
            doc.default = "needed".into();
        }
        if missing {
            self.problem(key, "is missing");
        }
        text.unwrap_or_default()
    }

    /// One of several words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&'static str, T)], help: &'static str) -> T {
        let names: Vec<String> = choices.iter().map(|(n, _)| format!("\"{n}\"")).collect();
        let (default, value) = choices[0];
        let Some(item) = self.take(key, format!("\"{default}\""), names.join(", "), help) else { return value };
        match choices.iter().find(|(n, _)| Some(*n) == item.as_str()) {
            Some((_, value)) => *value,
            None => {
                let near = nearest(item.as_str().unwrap_or_default(), choices.iter().map(|(n, _)| *n));
                self.wrong(key, &item, format!("one of {}{near}", names.join(", ")));
                value
            }
        }
    }

    /// A list of texts.
    pub fn texts(&mut self, key: &'static str, values: &'static str, help: &'static str) -> Vec<String> {
        self.list(key, values, help, "a list of texts", |v| v.as_str().map(String::from))
    }

    /// A list of numbers.
    pub fn numbers(&mut self, key: &'static str, values: &'static str, help: &'static str) -> Vec<f64> {
        self.list(key, values, help, "a list of numbers", |v| v.as_float().or(v.as_integer().map(|n| n as f64)))
    }

    fn list<T>(
        &mut self,
        key: &'static str,
        values: &'static str,
        help: &'static str,
        wanted: &str,
        one: impl Fn(&toml_edit::Value) -> Option<T>,
    ) -> Vec<T> {
        let Some(item) = self.take(key, "[]", values, help) else { return Vec::new() };
        match item.as_array().and_then(|a| a.iter().map(one).collect::<Option<Vec<_>>>()) {
            Some(list) => list,
            None => {
                self.wrong(key, &item, wanted);
                Vec::new()
            }
        }
    }

    /// A path, relative to the configuration's folder; it need not exist.
    pub fn path(&mut self, key: &'static str, base: &Path, help: &'static str) -> Option<PathBuf> {
        self.text(key, "a path, relative to this file", help).map(|p| super::resolve(base, &p))
    }

    /// A file or folder that must exist when it is named.
    pub fn existing(&mut self, key: &'static str, base: &Path, help: &'static str) -> Option<PathBuf> {
        let path = self.path(key, base, help)?;
        if !path.exists() {
            self.problem(key, format!("names {}, which does not exist", path.display()));
        }
        Some(path)
    }
}
