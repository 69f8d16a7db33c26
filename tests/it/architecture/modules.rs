//! The files of a crate and which of them name items of which.
//!
//! A name that a module re-exports belongs to the file it comes from. A re-export is no import unless its file uses the
//! name itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::tokens::{Token, tokens};

type Segments = Vec<String>;

/// One file.
struct Module {
    file: PathBuf,
    tokens: Vec<Token>,
    /// Names that `use` brings in, with where they come from in this crate.
    bound: BTreeMap<String, Segments>,
}

/// A crate's files by module path; the root's is empty.
pub struct Crate {
    modules: BTreeMap<Segments, Module>,
}

/// Files that a file imports from, each with one path that it names.
pub type Imports = BTreeMap<PathBuf, BTreeMap<PathBuf, String>>;

/// A path in a file, where it stands, and whether it is in a `use`.
struct Mention {
    path: Segments,
    /// The name it is bound to and whether that is public, in a `use`.
    import: Option<(String, bool)>,
}

impl Crate {
    /// Reads a crate from its root file, following `mod name;`.
    pub fn read(root: &Path) -> Self {
        let mut found = Self { modules: BTreeMap::new() };
        found.add(Vec::new(), root.to_path_buf(), root.parent().unwrap());
        let paths: Vec<Segments> = found.modules.keys().cloned().collect();
        for path in paths {
            let bound = found.mentions(&path).into_iter();
            let bound = bound.filter_map(|m| Some((m.import?.0, m.path))).collect();
            found.modules.get_mut(&path).unwrap().bound = bound;
        }
        found
    }

    fn add(&mut self, path: Segments, file: PathBuf, children: &Path) {
        let source = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let tokens = tokens(&source);
        let declared: Vec<String> = tokens
            .windows(3)
            .filter(|w| w[0].word() == Some("mod") && w[2].is(';'))
            .filter_map(|w| Some(w[1].word()?.to_string()))
            .collect();
        self.modules.insert(path.clone(), Module { file, tokens, bound: BTreeMap::new() });
        for name in declared {
            let folder = children.join(&name);
            let beside = children.join(format!("{name}.rs"));
            let file = if beside.exists() { beside } else { folder.join("mod.rs") };
            let path = [path.as_slice(), &[name]].concat();
            self.add(path, file, &folder);
        }
    }

    /// The file that defines what a path from the crate's root names.
    fn locate(&self, path: &[String], depth: usize) -> Segments {
        let known = (0..=path.len()).rev().find(|&n| self.modules.contains_key(&path[..n])).unwrap_or(0);
        let module = path[..known].to_vec();
        match path.get(known).and_then(|name| self.modules[&module].bound.get(name)) {
            Some(source) if depth < 16 => {
                let path = [source.as_slice(), &path[known + 1..]].concat();
                self.locate(&path, depth + 1)
            }
            _ => module,
        }
    }

    /// All paths of a file that lead into this crate, from its root.
    fn mentions(&self, module: &Segments) -> Vec<Mention> {
        let tokens = &self.modules[module].tokens;
        let mut found = Vec::new();
        // Depths of braces at which modules inside the file begin: `super` in them is the file.
        let (mut inner, mut depth): (Vec<usize>, usize) = (Vec::new(), 0);
        let mut i = 0;
        while i < tokens.len() {
            match &tokens[i] {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => {
                    depth = depth.saturating_sub(1);
                    inner.retain(|&begin| begin <= depth);
                }
                Token::Word(word) if word == "mod" && tokens.get(i + 2).is_some_and(|t| t.is('{')) => {
                    inner.push(depth + 1);
                }
                Token::Word(word) if word == "use" => {
                    let public = i > 0 && (tokens[i - 1].word() == Some("pub") || tokens[i - 1].is(')'));
                    let mut tree = Vec::new();
                    i = use_tree(tokens, i + 1, &[], &mut tree);
                    for (path, name) in tree {
                        if let Some(path) = self.absolute(module, inner.len(), &path) {
                            found.push(Mention { path, import: Some((name, public)) });
                        }
                    }
                    continue;
                }
                Token::Word(_) if tokens.get(i + 1) == Some(&Token::Separator) && !follows_path(tokens, i) => {
                    let (path, end) = plain_path(tokens, i);
                    if let Some(path) = self.absolute(module, inner.len(), &path) {
                        found.push(Mention { path, import: None });
                    }
                    i = end;
                    continue;
                }
                _ => {}
            }
            i += 1;
        }
        found
    }

    /// A path from the crate's root, if it leads into the crate; `inner` modules of the file are around it.
    fn absolute(&self, module: &Segments, inner: usize, path: &[String]) -> Option<Segments> {
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => Some(rest.to_vec()),
            "self" => Some([module.as_slice(), rest].concat()),
            "super" if inner > 0 => self.absolute(module, inner - 1, &[&["self".to_string()], rest].concat()),
            "super" => {
                let parent = module.split_last()?.1.to_vec();
                self.absolute(&parent, 0, &[&["self".to_string()], rest].concat())
            }
            name => {
                let child = [module.as_slice(), &[name.to_string()]].concat();
                if self.modules.contains_key(&child) {
                    return Some([child.as_slice(), rest].concat());
                }
                let bound = self.modules[module].bound.get(name)?;
                Some([bound.as_slice(), rest].concat())
            }
        }
    }

    /// What every file imports, by files.
    pub fn imports(&self) -> Imports {
        let mut all = Imports::new();
        for (path, module) in &self.modules {
            let mut of_file = BTreeMap::new();
            for Mention { path: named, import } in self.mentions(path) {
                let uses = |name: &str| module.tokens.iter().filter(|t| t.word() == Some(name)).count() > 1;
                let counts = match &import {
                    // Of a module only what is named by it counts, and of a re-export what its file uses.
                    Some((name, _)) if name == "*" => true,
                    Some((name, public)) => !self.modules.contains_key(&named) && (!public || uses(name)),
                    None => true,
                };
                let target = self.locate(&named, 0);
                if counts && target != *path {
                    of_file.entry(self.modules[&target].file.clone()).or_insert_with(|| named.join("::"));
                }
            }
            all.insert(module.file.clone(), of_file);
        }
        all
    }
}

/// Whether the word at `i` goes on with a path, or is a field or method.
fn follows_path(tokens: &[Token], i: usize) -> bool {
    i > 0 && (tokens[i - 1] == Token::Separator || tokens[i - 1].is('.'))
}

/// The words of a path, and where it ends.
fn plain_path(tokens: &[Token], begin: usize) -> (Segments, usize) {
    let mut path = Vec::new();
    let mut i = begin;
    while let Some(word) = tokens.get(i).and_then(Token::word) {
        path.push(word.to_string());
        i += 1;
        if tokens.get(i) != Some(&Token::Separator) || tokens.get(i + 1).and_then(Token::word).is_none() {
            break;
        }
        i += 1;
    }
    (path, i)
}

/// Reads a `use` up to what follows it: its leaves, each with the name it is bound to.
fn use_tree(tokens: &[Token], begin: usize, prefix: &[String], leaves: &mut Vec<(Segments, String)>) -> usize {
    // A glob binds nothing that could be followed.
    let glob = |leaves: &mut Vec<(Segments, String)>, path: Segments, i: usize| {
        leaves.push((path, "*".into()));
        i + 1
    };
    if tokens.get(begin).is_some_and(|t| t.is('*')) {
        return glob(leaves, prefix.to_vec(), begin);
    }
    let (more, mut i) = plain_path(tokens, begin);
    let mut path = [prefix, &more].concat();
    if tokens.get(i) == Some(&Token::Separator) {
        i += 1;
        if tokens.get(i).is_some_and(|t| t.is('{')) {
            i += 1;
            while tokens.get(i).is_some_and(|t| !t.is('}')) {
                i = use_tree(tokens, i, &path, leaves);
                i += usize::from(tokens.get(i).is_some_and(|t| t.is(',')));
            }
            return i + 1;
        }
        return glob(leaves, path, i);
    }
    if path.last().is_some_and(|last| last == "self") && path.len() > 1 {
        path.pop();
    }
    let Some(mut name) = path.last().cloned() else { return i + 1 };
    if tokens.get(i).and_then(Token::word) == Some("as") {
        name = tokens.get(i + 1).and_then(Token::word).unwrap_or("_").to_string();
        i += 2;
    }
    leaves.push((path, name));
    i
}
