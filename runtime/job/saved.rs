//! The copy of a configuration that a job keeps in its directory.

use std::fs;
use std::path::Path;

use super::config::Config;
use super::origin::{Origin, keep};
use crate::algorithms::Algorithms;
use crate::config::{ConfigError, Problem, with_values};
use crate::error::{At, Error, Result};

/// The configuration's copy in the job's directory.
pub const CONFIG_FILE: &str = "job.toml";

/// A document as it is kept, and where it came from.
#[derive(Debug, Clone)]
pub struct Kept {
    pub source: String,
    pub origin: Origin,
}

impl Kept {
    /// A document whose paths are relative to `base`. `stage` is the stage that works in the directory, of several.
    pub fn new(source: impl Into<String>, base: impl Into<String>, stage: Option<usize>) -> Self {
        Self { source: source.into(), origin: Origin::new(base, stage) }
    }

    /// What a directory keeps.
    pub fn of(directory: &Path) -> Result<Self> {
        let copy = directory.join(CONFIG_FILE);
        let text = match fs::read_to_string(&copy) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Error::NothingToResume(directory.into())),
            text => text.at(&copy)?,
        };
        let (origin, source) = Origin::of(directory, &text)?;
        Ok(Self { source, origin })
    }

    /// Keeps it in a directory, in the place of an earlier one, which is there until the new one is whole.
    pub fn save(&self, directory: &Path) -> Result<()> {
        self.origin.save(directory)?;
        keep(&directory.join(CONFIG_FILE), &self.source)
    }

    /// Keeps it in the directory of a job that has begun: with the arithmetic that the job was begun with.
    pub fn save_again(&self, directory: &Path) -> Result<()> {
        self.clone().adopting(directory)?.save(directory)
    }
}

impl Kept {
    /// The same with the arithmetic and the date that the job in a directory was begun with, if there is one.
    pub fn adopting(mut self, directory: &Path) -> Result<Self> {
        match Self::of(directory) {
            Ok(known) => (self.origin.results, self.origin.day) = (known.origin.results, known.origin.day),
            // Somebody removed the copy; the store still says what the job is.
            Err(Error::NothingToResume(_)) => {}
            Err(e) => return Err(e),
        }
        Ok(self)
    }
}

/// A configuration that was kept.
pub struct Saved {
    pub stages: Vec<Config>,
    pub kept: Kept,
}

/// Reads the copy in a directory; `None` if there is none. Of a directory that belongs to one stage, that stage alone; the
/// directory may have been moved since. `values` take the place of those of the copy.
pub fn read(directory: &Path, algorithms: &Algorithms, values: &[String]) -> Result<Option<Saved>> {
    let copy = directory.join(CONFIG_FILE);
    if !copy.exists() {
        return Ok(None);
    }
    let (saved, problems) = read_copy(directory, &copy, algorithms, values)?;
    if problems.is_empty() { Ok(Some(saved)) } else { Err(ConfigError::new(problems).in_file(&copy).into()) }
}

fn read_copy(
    directory: &Path,
    copy: &Path,
    algorithms: &Algorithms,
    values: &[String],
) -> Result<(Saved, Vec<Problem>)> {
    let mut kept = Kept::of(directory)?;
    kept.source = with_values(&kept.source, values)?;
    let base = Path::new(&kept.origin.base);
    let (mut stages, problems) = algorithms.read(&kept.source, base).map_err(|e| e.in_file(copy))?;
    match kept.origin.stage {
        Some(stage) if stage < stages.len() => stages = vec![stages.swap_remove(stage)],
        _ => {}
    }
    if let [only] = stages.as_mut_slice() {
        only.common.job.directory = directory.into();
    }
    Ok((Saved { stages, kept }, problems))
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
        one(read(directory, self, &[])?.ok_or_else(|| Error::NothingToResume(directory.into()))?, directory)
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
    one(read_copy(directory, &copy, &Algorithms::default(), &[])?.0, directory)
}

/// The day on which the job in a directory began; `None` for jobs that print no date.
pub fn saved_day(directory: &Path) -> Result<Option<u32>> {
    Ok(Kept::of(directory)?.origin.day)
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
