//! Keys that name files, folders and models.

use std::path::{Component, Path, PathBuf};

use toml_edit::Item;

use super::keys::Kind;
use super::section::{Described, Section, list_of, quoted};

/// Continues the message on a model that does not exist, and may be one of the Hub.
const HUB: &str = "; if it is a model of the Hugging Face Hub, which nothing is downloaded from, fetch it first \
                   (`hf download OWNER/NAME --local-dir DIR`) and name the directory";

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ModelSource {
    /// The tiny model inside this program.
    #[default]
    Embedded,
    /// A Hugging Face directory or a GGUF file.
    Path(PathBuf),
}

impl ModelSource {
    fn toml(&self) -> String {
        match self {
            Self::Embedded => quoted("embedded"),
            Self::Path(path) => quoted(&path.to_string_lossy()),
        }
    }
}

/// The folder of a file, in full, so that a job means the same from everywhere.
pub fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    folder.canonicalize().unwrap_or_else(|_| folder.into())
}

/// A path as it was typed, seen from `base`, without `.` and `..` in the middle.
fn resolve(base: &Path, typed: &str) -> PathBuf {
    let mut resolved = PathBuf::new();
    for part in base.join(typed).components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(resolved.components().next_back(), Some(Component::Normal(_))) => {
                resolved.pop();
            }
            part => resolved.push(part),
        }
    }
    if resolved.as_os_str().is_empty() { ".".into() } else { resolved }
}

fn text(item: &Item) -> Result<&str, String> {
    item.as_str().ok_or_else(|| "a text in quotes".into())
}

impl Section<'_> {
    /// A path that must be given; it need not exist.
    pub fn needed_path(&mut self, key: &'static str, value: &mut PathBuf, help: &'static str) {
        let base = self.keys.base.clone();
        self.speed().visit(
            Described { key, kind: Kind::Text, values: "a path, relative to this file".into(), help },
            value,
            |item| Ok(resolve(&base, text(item)?)),
            |_| Ok(()),
            |path| Some(if path.as_os_str().is_empty() { "needed".into() } else { quoted(&path.to_string_lossy()) }),
        );
        if value.as_os_str().is_empty() && !self.has(key) {
            self.problem(key, "is missing");
        }
    }

    /// A file or folder whose content is read; it may be absent, and must exist when it is named.
    pub fn path(&mut self, key: &'static str, value: &mut Option<PathBuf>, help: &'static str) {
        let base = self.keys.base.clone();
        self.content().visit(
            Described { key, kind: Kind::Text, values: "a path, relative to this file".into(), help },
            value,
            |item| Ok(Some(resolve(&base, text(item)?))),
            |_| Ok(()),
            |path| path.as_ref().map(|path| quoted(&path.to_string_lossy())),
        );
        self.exist(key, value.as_slice());
    }

    /// Files or folders whose content is read, all of which must exist.
    pub fn paths(&mut self, key: &'static str, value: &mut Vec<PathBuf>, help: &'static str) {
        let base = self.keys.base.clone();
        self.content().visit(
            Described { key, kind: Kind::Texts, values: "a list of paths, relative to this file".into(), help },
            value,
            |item| list_of(item, |v| v.as_str().map(|p| resolve(&base, p))).ok_or_else(|| "a list of texts".into()),
            |_| Ok(()),
            |paths| {
                Some(format!("[{}]", paths.iter().map(|p| quoted(&p.to_string_lossy())).collect::<Vec<_>>().join(", ")))
            },
        );
        self.exist(key, value);
    }

    fn exist(&mut self, key: &str, paths: &[PathBuf]) {
        for path in paths.iter().filter(|path| !path.exists()) {
            self.problem(key, format!("names {}, which does not exist", path.display()));
        }
    }

    /// A model, which may be absent: the embedded one, a path, or a stage's.
    pub fn model(&mut self, key: &'static str, value: &mut Option<ModelSource>, help: &'static str) {
        let values = "\"embedded\", a path to a Hugging Face directory or .gguf file, or \"stage:NAME\"";
        let mut name: Option<String> = None;
        self.content().visit(
            Described { key, kind: Kind::Text, values: values.into(), help },
            value,
            |item| {
                let given = text(item)?;
                name = Some(given.into());
                Ok(Some(ModelSource::Embedded))
            },
            |_| Ok(()),
            |model| model.as_ref().map(ModelSource::toml),
        );
        if let Some(name) = name {
            *value = Some(self.model_named(key, &name));
        }
        self.models_exist(key, value.as_slice());
        self.revalue(value.as_ref().map(ModelSource::toml));
    }

    /// A list of models.
    pub fn models(&mut self, key: &'static str, value: &mut Vec<ModelSource>, values: &str, help: &'static str) {
        let mut names: Option<Vec<String>> = None;
        self.content().visit(
            Described { key, kind: Kind::Texts, values: values.into(), help },
            value,
            |item| {
                let given = list_of(item, |v| v.as_str().map(String::from)).ok_or("a list of texts")?;
                names = Some(given);
                Ok(Vec::new())
            },
            |_| Ok(()),
            |_| Some("[]".into()),
        );
        if let Some(names) = names {
            *value = names.iter().map(|name| self.model_named(key, name)).collect();
        }
        self.models_exist(key, value);
        self.revalue(Some(format!("[{}]", value.iter().map(ModelSource::toml).collect::<Vec<_>>().join(", "))));
    }

    /// A model by the name that was typed.
    fn model_named(&mut self, key: &str, name: &str) -> ModelSource {
        if name == "embedded" {
            return ModelSource::Embedded;
        }
        let Some(stage) = name.strip_prefix("stage:") else {
            return ModelSource::Path(resolve(&self.keys.base, name));
        };
        match self.earlier().model(stage).cloned() {
            Some(path) => ModelSource::Path(path),
            None => {
                self.problem(key, format!("names the stage `{stage}`, which does not come before this one"));
                ModelSource::Embedded
            }
        }
    }

    fn models_exist(&mut self, key: &str, models: &[ModelSource]) {
        for model in models {
            if let ModelSource::Path(path) = model
                && !path.exists()
                && !self.earlier().has(path)
            {
                let hub = if self.is_hub_name(key) { HUB } else { "" };
                self.problem(key, format!("names {}, which does not exist{hub}", path.display()));
            }
        }
    }

    /// Whether the document names a model as the Hugging Face Hub does: `owner/name`.
    fn is_hub_name(&self, key: &str) -> bool {
        let is_part = |part: &str| {
            !part.is_empty() && !part.starts_with('.') && part.chars().all(|c| c.is_alphanumeric() || "-_.".contains(c))
        };
        let given = self.keys.document.item(self.name, key).and_then(|item| item.as_str());
        given.and_then(|name| name.split_once('/')).is_some_and(|(owner, name)| is_part(owner) && is_part(name))
    }

    /// Sets what the last visited key's value is noted as.
    fn revalue(&mut self, value: Option<String>) {
        if let Some(key) = self.keys.all.last_mut() {
            key.value = value;
        }
    }
}
