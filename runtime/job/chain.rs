//! Several jobs one after the other, each from where the last one ended: `[[stage]]` in one file.

use std::fs;
use std::path::{Path, PathBuf};

use rehearsal_actors::Devices;
use rehearsal_store::{Disk, Files as _, Store};
use tokio_util::sync::CancellationToken;

use super::config::Config;
use super::job::Job;
use super::saved::{self, CONFIG_FILE, Kept, Saved};
use crate::algorithms::Algorithms;
use crate::blocking::blocking;
use crate::config::{folder_of, with_values};
use crate::driver::MODEL_FOLDER;
use crate::error::{At, Error, Result};
use crate::events::Outcome;

/// The stages of a file: one, for a file without `[[stage]]`.
///
/// ```no_run
/// # async fn f() -> rehearsal::Result<()> {
/// use rehearsal::Chain;
///
/// let chain = Chain::load("examples/instructgpt.toml".as_ref())?;
/// let show = &mut |job: &rehearsal::Job| println!("stage {}", job.directory().display());
/// let outcome = chain.run(false, Default::default(), show).await?;
/// println!("{} of {} steps of the last stage", outcome.step, outcome.steps);
/// # Ok(())
/// # }
/// ```
pub struct Chain {
    stages: Vec<Config>,
    source: String,
    base: String,
    devices: Option<Devices>,
}

impl Chain {
    /// Reads a document whose paths are relative to `base`.
    pub fn from_toml(source: &str, base: &Path) -> Result<Self> {
        let stages = Config::stages(source, base)?;
        Ok(Self { stages, source: source.into(), base: base.display().to_string(), devices: None })
    }

    /// Reads a file.
    pub fn load(file: &Path) -> Result<Self> {
        Self::load_with(file, &[])
    }

    /// Reads a file with values in place of its own: `section.key=value` each, or `stage.2.section.key=value` for the second
    /// stage. They belong to the copy that the job keeps.
    pub fn load_with(file: &Path, values: &[String]) -> Result<Self> {
        let source = with_values(&fs::read_to_string(file).at(file)?, values)?;
        let base = folder_of(file);
        let stages = Config::stages(&source, &base).map_err(|e| e.in_file(file))?;
        Ok(Self { stages, source, base: base.display().to_string(), devices: None })
    }

    /// Reads what was started in a directory.
    pub fn saved(directory: &Path) -> Result<Self> {
        Self::saved_with(directory, &[])
    }

    /// The same with values in place of those that were kept, as [`Chain::load_with`]. Those that change results are refused
    /// when the job is resumed.
    pub fn saved_with(directory: &Path, values: &[String]) -> Result<Self> {
        let Saved { stages, kept } = saved::read(directory, &Algorithms::default(), values)?
            .ok_or_else(|| Error::NothingToResume(directory.into()))?;
        Ok(Self { stages, source: kept.source, base: kept.origin.base, devices: None })
    }

    /// Devices of all stages, in place of each stage's own, as [`JobBuilder::devices`](crate::JobBuilder::devices).
    pub fn devices(mut self, devices: Devices) -> Self {
        self.devices = Some(devices);
        self
    }

    /// The configurations, in order.
    pub fn stages(&self) -> &[Config] {
        &self.stages
    }

    /// The folder of the stages' folders, if there are several.
    fn folder(&self) -> Option<&Path> {
        match self.stages.as_slice() {
            [first, _, ..] => first.common.job.directory.parent(),
            _ => None,
        }
    }

    /// Runs or resumes the stages that are not done. `watch` sees each job before it starts.
    pub async fn run(self, resume: bool, cancel: CancellationToken, watch: &mut dyn FnMut(&Job)) -> Result<Outcome> {
        let folder: Option<PathBuf> = self.folder().map(Into::into);
        let mut whole = Kept::new(&self.source, &self.base, None);
        match folder.clone() {
            Some(folder) if resume => whole = blocking(move || whole.adopting(&folder)).await?,
            Some(folder) => create(folder, whole.clone()).await?,
            None => {}
        }
        let count = self.stages.len();
        let several = count > 1;
        let mut last = None;
        for (i, config) in self.stages.into_iter().enumerate() {
            let directory = config.common.job.directory.clone();
            // A stage's model is written when it is done. The last stage is resumed all the same: of a finished chain it
            // says, as a finished job does, how it ended.
            if i + 1 < count && directory.join(MODEL_FOLDER).is_dir() {
                continue;
            }
            // Arithmetic and date are the chain's, whenever a stage begins.
            let mut kept = Kept::new(&self.source, &self.base, several.then_some(i));
            (kept.origin.results, kept.origin.day) = (whole.origin.results, whole.origin.day);
            let job = |config: Config| {
                let mut job = Job::builder(config).kept(kept.clone());
                if let Some(devices) = self.devices.clone() {
                    job = job.devices(devices);
                }
                match folder.clone() {
                    Some(folder) => job.chain(folder, whole.clone()).build(),
                    None => job.build(),
                }
            };
            let again = resume && (!several || Store::exists(&directory));
            let first = job(config.clone())?;
            watch(&first);
            let outcome = if again { first.resume(cancel.clone()).await } else { first.run(cancel.clone()).await };
            let outcome = match outcome {
                // A stage that was killed before its settings were kept starts anew.
                Err(Error::NothingToResume(_)) if several => {
                    let anew = job(config)?;
                    watch(&anew);
                    anew.run(cancel.clone()).await?
                }
                other => other?,
            };
            let stopped = outcome.stopped;
            last = Some(outcome);
            if stopped {
                break;
            }
        }
        last.ok_or_else(|| Error::Internal("a chain without a stage".into()))
    }
}

/// Creates the folder of a chain with the copy of its configuration.
async fn create(folder: PathBuf, kept: Kept) -> Result<()> {
    blocking(move || {
        // An empty copy is what a power loss has left; nothing had begun.
        if fs::metadata(folder.join(CONFIG_FILE)).is_ok_and(|copy| copy.len() > 0) {
            return Err(Error::Exists(folder));
        }
        Disk.create_directory(&folder).at(&folder)?;
        kept.save(&folder)
    })
    .await
}
