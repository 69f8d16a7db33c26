//! The visit of all keys: who visits, what is left behind.

use std::path::{Path, PathBuf};

use super::document::Document;
use super::problem::Problem;
use super::range::Range;
use super::section::Section;
use super::stages::Earlier;

/// Typed settings of one or more sections.
///
/// [`Settings::visit`] names every key once, with the field that holds its value, its range and its help. Fields have
/// their default values before a visit and the configured ones after it.
pub trait Settings {
    /// Visits every key, and reports values that contradict one another.
    fn visit(&mut self, keys: &mut Keys);
}

/// Whether a key may differ when a job is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Changes results. It is part of the job's fingerprint: a resumed job must have the same value.
    Result,
    /// Names a file or model whose content is part of the fingerprint, wherever it lies.
    Content,
    /// Changes speed, memory, limits, or how long the job goes on. It may differ on resume.
    Speed,
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A floating-point number in a range.
    Number(Range),
    /// A whole number in a range.
    Integer(Range),
    /// `true` or `false`.
    Flag,
    /// A text.
    Text,
    /// One of these words.
    Choice(Vec<&'static str>),
    /// A list of texts.
    Texts,
    /// A text or a list of texts.
    TextOrTexts,
    /// A list of numbers.
    Numbers,
}

/// A key as a visit found it.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// Section that it is in.
    pub section: &'static str,
    /// Name within the section.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// The default as the reference shows it.
    pub default: String,
    /// The values that may be given, in words.
    pub values: String,
    /// What the key does, as Markdown.
    pub help: &'static str,
    /// Whether it may differ when a job is resumed.
    pub effect: Effect,
    /// The value as TOML; `None` where a key without a default has none.
    pub value: Option<String>,
}

/// A visit under way: the document that is read, if any, and what was found.
#[derive(Default)]
pub struct Keys {
    pub(super) document: Document,
    /// Folder that paths in the document are relative to.
    pub(super) base: PathBuf,
    pub(super) earlier: Earlier,
    /// Problems that were found so far.
    pub problems: Vec<Problem>,
    /// Keys in the order of the visit.
    pub all: Vec<Key>,
}

impl Keys {
    /// A visit that reads a document whose paths are relative to `base`; models of `earlier` stages may be named.
    pub(crate) fn reading(document: Document, base: &Path, earlier: Earlier) -> Self {
        Self { document, base: base.into(), earlier, ..Self::default() }
    }

    /// A section; it may be absent from the document.
    pub fn section(&mut self, name: &'static str) -> Section<'_> {
        Section::new(self, name)
    }

    /// Reports every section and key of the document that was not visited. `hint` continues the message on a key by what
    /// it is called here, or is empty.
    pub fn report_unknown(&mut self, hint: impl Fn(&str) -> String) {
        let known: Vec<_> = self.all.iter().map(|key| (key.section, key.name)).collect();
        let unknown = self.document.unknown(&known, &hint);
        self.problems.extend(unknown);
    }

    /// Sections of the document, with the lines they begin in.
    pub fn sections(&self) -> Vec<(String, usize)> {
        self.document.sections()
    }

    /// Sections of the document, with the lines they begin in, of which no key has been visited yet.
    pub fn unvisited_sections(&self) -> Vec<(String, usize)> {
        let visited = |section: &str| self.all.iter().any(|key| key.section == section);
        self.document.sections().into_iter().filter(|(section, _)| !visited(section)).collect()
    }

    /// The keys that were visited, each once, section by section in the order in which sections were first visited.
    pub fn by_section(&self) -> Vec<(&'static str, Vec<&Key>)> {
        let mut sections: Vec<(&'static str, Vec<&Key>)> = Vec::new();
        for key in &self.all {
            let at = sections.iter().position(|(name, _)| *name == key.section).unwrap_or_else(|| {
                sections.push((key.section, Vec::new()));
                sections.len() - 1
            });
            if !sections[at].1.iter().any(|k| k.name == key.name) {
                sections[at].1.push(key);
            }
        }
        sections
    }

    /// `section.key` and value of every key that changes results, each once, in the order of names.
    pub fn fingerprint(&self) -> Vec<(String, String)> {
        let relevant = self.all.iter().filter(|key| key.effect == Effect::Result);
        let line = |key: &Key| (format!("{}.{}", key.section, key.name), key.value.clone().unwrap_or("none".into()));
        let lines: std::collections::BTreeMap<_, _> = relevant.map(line).collect();
        lines.into_iter().collect()
    }

    /// The visited values as a TOML document. Reading it gives the same settings.
    pub fn toml(&self) -> String {
        let mut out = String::new();
        for (section, keys) in self.by_section() {
            let lines: Vec<String> =
                keys.iter().filter_map(|key| Some(format!("{} = {}\n", key.name, key.value.as_ref()?))).collect();
            if !lines.is_empty() {
                let apart = if out.is_empty() { "" } else { "\n" };
                out.push_str(&format!("{apart}[{section}]\n{}", lines.concat()));
            }
        }
        out
    }
}
