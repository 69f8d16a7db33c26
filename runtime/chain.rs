//! Several jobs one after the other, each from where the last one ended: `[[stage]]` in one file.

use std::fs;
use std::path::Path;

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{At, Error, Result};
use crate::events::Outcome;
use crate::job::{CONFIG_FILE, Job, MODEL_FOLDER};

/// The stages of a file: one, for a file without `[[stage]]`.
pub struct Chain {
    stages: Vec<Config>,
    source: String,
    base: String,
}

impl Chain {
    /// Reads a document whose paths are relative to `base`.
    pub fn from_toml(source: &str, base: &Path) -> Result<Self> {
        let stages = Config::stages(source, base)?;
        Ok(Self { stages, source: source.into(), base: base.display().to_string() })
    }

    /// Reads a file.
    pub fn load(file: &Path) -> Result<Self> {
        let source = fs::read_to_string(file).at(file)?;
        let base = crate::config::folder_of(file);
        let named = |e| crate::config::ConfigError { file: file.into(), ..e };
        let stages = Config::stages(&source, &base).map_err(named)?;
        Ok(Self { stages, source, base: base.display().to_string() })
    }

    /// Goes on with what was started in a directory.
    pub fn saved(directory: &Path) -> Result<Self> {
        let copy = directory.join(CONFIG_FILE);
        if !copy.exists() {
            return Err(Error::NothingToResume(directory.into()));
        }
        let source = fs::read_to_string(&copy).at(&copy)?;
        let Header { base, stage } = Header::of(&source);
        let named = |e| crate::config::ConfigError { file: copy.clone(), ..e };
        let mut stages = Config::stages(&source, Path::new(&base)).map_err(named)?;
        match stage {
            // The directory is that of one stage, or of a job that is one; it may have been moved since.
            Some(stage) if stage < stages.len() => {
                stages = vec![Config {
                    job: crate::config::JobConfig { directory: directory.into(), ..stages[stage].job.clone() },
                    ..stages[stage].clone()
                }];
            }
            _ if stages.len() == 1 => stages[0].job.directory = directory.into(),
            _ => {}
        }
        let source = source.lines().skip_while(|line| line.starts_with("# base = ") || line.starts_with("# stage = "));
        Ok(Self { stages, source: source.collect::<Vec<_>>().join("\n"), base })
    }

    /// The configurations, in order.
    pub fn stages(&self) -> &[Config] {
        &self.stages
    }

    /// Where stages lie beside one another, if there are several.
    fn folder(&self) -> Option<&Path> {
        match self.stages.as_slice() {
            [first, _, ..] => first.job.directory.parent(),
            _ => None,
        }
    }

    /// Runs or resumes the stages that are not done. `watch` sees each job before it starts.
    pub async fn run(self, resume: bool, cancel: CancellationToken, watch: &mut dyn FnMut(&Job)) -> Result<Outcome> {
        if let Some(folder) = self.folder().filter(|_| !resume) {
            let copy = folder.join(CONFIG_FILE);
            if copy.exists() {
                return Err(Error::Exists(folder.into()));
            }
            fs::create_dir_all(folder).at(folder)?;
            fs::write(&copy, format!("# base = {}\n{}", self.base, self.source)).at(&copy)?;
        }
        let count = self.stages.len();
        let several = count > 1;
        let mut last = None;
        for (i, config) in self.stages.into_iter().enumerate() {
            let directory = config.job.directory.clone();
            // A stage's model is written when it is done. The last stage is resumed all the same: of a finished chain it
            // says, as a finished job does, how it ended.
            if i + 1 < count && directory.join(MODEL_FOLDER).is_dir() {
                continue;
            }
            let stage = if several { format!("# stage = {i}\n") } else { String::new() };
            let source = format!("# base = {}\n{stage}{}", self.base, self.source);
            let job = |config: Config| Job::builder(config).source(source.clone()).build();
            let again = resume && (!several || directory.join("store").is_dir());
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
        last.ok_or_else(|| Error::State("a chain without a stage".into()))
    }
}

/// What the first lines of a kept configuration say of it.
struct Header {
    base: String,
    stage: Option<usize>,
}

impl Header {
    fn of(source: &str) -> Self {
        let find = |key: &str| source.lines().take(2).find_map(|line| line.strip_prefix(key));
        let base = find("# base = ").unwrap_or(".").to_string();
        Self { base, stage: find("# stage = ").and_then(|n| n.parse().ok()) }
    }
}
