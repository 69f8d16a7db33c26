//! The copy of a configuration that a job keeps in its directory.

use std::fs;
use std::path::Path;

use super::config::Config;
use crate::algorithms::Algorithms;
use crate::config::{ConfigError, Problem};
use crate::error::{At, Error, Result};

/// The configuration's copy in the job's directory.
pub const CONFIG_FILE: &str = "job.toml";

/// Key of the header's line with the folder that paths are relative to.
const BASE: &str = "# base = ";
/// Key of the header's line with the number of the stage.
const STAGE: &str = "# stage = ";

/// A configuration that was kept.
pub struct Saved {
    pub stages: Vec<Config>,
    /// The document without its header.
    pub source: String,
    /// Folder that its paths are relative to.
    pub base: String,
}

/// A document with the header that [`read`] understands. `stage` is the stage that works in the directory, of several.
pub fn with_header(source: &str, base: &str, stage: Option<usize>) -> String {
    let stage = stage.map_or(String::new(), |stage| format!("{STAGE}{stage}\n"));
    format!("{BASE}{base}\n{stage}{source}")
}

/// Reads the copy in a directory; `None` if there is none. Of a directory that belongs to one stage, that stage alone; the
/// directory may have been moved since.
pub fn read(directory: &Path, algorithms: &Algorithms) -> Result<Option<Saved>> {
    let copy = directory.join(CONFIG_FILE);
    if !copy.exists() {
        return Ok(None);
    }
    let (saved, problems) = read_copy(directory, &copy, algorithms)?;
    if problems.is_empty() { Ok(Some(saved)) } else { Err(ConfigError::new(problems).in_file(&copy).into()) }
}

fn read_copy(directory: &Path, copy: &Path, algorithms: &Algorithms) -> Result<(Saved, Vec<Problem>)> {
    let text = fs::read_to_string(copy).at(copy)?;
    let find = |key: &str| text.lines().take(2).find_map(|line| line.strip_prefix(key));
    let base = find(BASE).unwrap_or(".").to_string();
    let stage: Option<usize> = find(STAGE).and_then(|n| n.parse().ok());
    let (mut stages, problems) = algorithms.read(&text, Path::new(&base)).map_err(|e| e.in_file(copy))?;
    match stage {
        Some(stage) if stage < stages.len() => stages = vec![stages.swap_remove(stage)],
        _ => {}
    }
    if let [only] = stages.as_mut_slice() {
        only.common.job.directory = directory.into();
    }
    let source = text.lines().skip_while(|line| line.starts_with(BASE) || line.starts_with(STAGE));
    Ok((Saved { stages, source: source.collect::<Vec<_>>().join("\n"), base }, problems))
}

impl Algorithms {
    /// The configuration of the job in a directory.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToResume`] if there is none, problems of the configuration, and that the directory holds several
    /// stages, of which each has a directory of its own.
    pub fn saved(&self, directory: impl AsRef<Path>) -> Result<Config> {
        let directory = directory.as_ref();
        one(read(directory, self)?.ok_or_else(|| Error::NothingToResume(directory.into()))?, directory)
    }
}

/// The configuration of the job in a directory, as far as this program can read it: the job may have an algorithm of
/// another program, and files that are gone.
///
/// # Errors
///
/// If there is none, or the directory holds several stages, of which each has a directory of its own.
pub fn saved_config(directory: &Path) -> Result<Config> {
    let copy = directory.join(CONFIG_FILE);
    if !copy.exists() {
        return Err(Error::NothingToResume(directory.into()));
    }
    one(read_copy(directory, &copy, &Algorithms::default())?.0, directory)
}

/// The only stage of a directory.
fn one(saved: Saved, directory: &Path) -> Result<Config> {
    match saved.stages.as_slice() {
        [config] => Ok(config.clone()),
        stages => {
            let folders: Vec<String> = stages.iter().map(|c| c.common.job.directory.display().to_string()).collect();
            let stages = folders.join(", ");
            Err(Error::Usage(format!("{} holds several stages; name one of them: {stages}", directory.display())))
        }
    }
}
