//! What a resumed job must have in common with the one that was interrupted: settings that change results, by value, and
//! models and data, by content.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rehearsal_store::{Disk, Store, replace_durably};

use super::config::Config;
use super::saved;
use crate::algorithms::Algorithms;
use crate::error::{At, Error, Result};

/// Where the store keeps the fingerprint.
const KEY: &str = "settings";
/// Copy of the fingerprint in the job's directory.
const COPY: &str = "fingerprint.json";
/// Where builds before the canonical lines kept theirs: the debug output of sections, and the same content hashes.
const LEGACY_KEY: &str = "fingerprint";

const REFERENCE: &str = "model.reference, its weights";
const REWARD_MODEL: &str = "reward model, its weights";
/// Content that older builds kept a hash of.
const CONTENT: [&str; 8] = [
    "model.policy, its weights",
    REFERENCE,
    "critic, its weights",
    REWARD_MODEL,
    "judge, its weights",
    "encoder, its weights",
    "the data",
    "the prompts",
];
/// Settings whose lines are the same in older builds.
const UNCHANGED: [&str; 2] = ["job.algorithm", "job.seed"];

type Lines = Vec<(String, String)>;

/// The fingerprint of a job.
pub struct Fingerprint {
    /// `section.key` and value of every setting that changes results.
    settings: Lines,
    /// Hashes of what was read, by name. A name may occur more than once.
    content: Lines,
    /// Whether the algorithm has a source of rewards.
    learns_online: bool,
    /// Default values of the settings.
    defaults: BTreeMap<String, String>,
}

impl Fingerprint {
    /// The fingerprint of a configuration and of what was read for it.
    pub fn new(config: &Config, content: Lines) -> Self {
        let defaults = config.default_fingerprint().into_iter().collect();
        Self { settings: config.fingerprint(), content, defaults, learns_online: config.algorithm.needs_reward() }
    }

    /// Whether the store has a job's fingerprint, of this build or an older one.
    pub fn is_in(store: &Store) -> Result<bool> {
        Ok(store.get_job::<Lines>(KEY)?.is_some() || store.get_job::<Lines>(LEGACY_KEY)?.is_some())
    }

    /// Writes the fingerprint into the store of `directory`, and beside it for when the store is lost.
    pub fn save(&self, store: &mut Store, directory: &Path) -> Result<()> {
        let all: Lines = self.settings.iter().chain(&self.content).cloned().collect();
        let text = serde_json::to_string_pretty(&all).map_err(|e| Error::Internal(e.to_string()))?;
        let path = directory.join(COPY);
        replace_durably(&Disk, &path, text.as_bytes()).at(&path)?;
        Ok(store.put_job(KEY, &all)?)
    }

    /// Compares with the fingerprint in the store of `directory`. A store of an older build has no canonical lines: its
    /// job's settings are those of its own `job.toml`. The fingerprint is saved where the store had none of this build.
    ///
    /// # Errors
    ///
    /// [`Error::Changed`] with every difference; [`Error::NothingToResume`] where the store holds no job;
    /// [`Error::SavedState`] where it has checkpoints and nothing says what settings they belong to.
    pub fn check(&self, store: &mut Store, directory: &Path) -> Result<()> {
        match store.get_job::<Lines>(KEY)? {
            Some(then) => {
                self.compare(&then, directory)?;
                if directory.join(COPY).exists() {
                    return Ok(());
                }
            }
            None => match store.get_job::<Lines>(LEGACY_KEY)? {
                Some(legacy) => self.compare_legacy(&legacy, directory)?,
                None if store.checkpoints()?.is_empty() => return Err(Error::NothingToResume(directory.into())),
                None => self.compare_copy(directory)?,
            },
        }
        self.save(store, directory)
    }

    /// Compares with the copy beside a store that was lost.
    fn compare_copy(&self, directory: &Path) -> Result<()> {
        let path = directory.join(COPY);
        let copy = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Lines>(&bytes).ok());
        let Some(then) = copy else {
            let reason = format!(
                "the database in {} is lost, and {COPY} beside it cannot be read: what settings its checkpoints belong to is \
                 not known. `rehearsal export` still writes the newest one's model",
                directory.display()
            );
            return Err(Error::SavedState { reason });
        };
        self.compare(&then, directory)
    }

    fn compare(&self, then: &Lines, directory: &Path) -> Result<()> {
        let now: Lines = self.settings.iter().chain(&self.content).cloned().collect();
        changed(directory, &self.differences(then, &now))
    }

    /// Settings are compared through the job's own `job.toml`, where it can still be read; algorithm and seed, whose lines
    /// have not changed, and content are compared with what the older build kept.
    fn compare_legacy(&self, legacy: &Lines, directory: &Path) -> Result<()> {
        let mut differences = Vec::new();
        // Data or models that have moved make the old document invalid; their content is compared below.
        if let Ok(Some(saved)) = saved::read(directory, &Algorithms::default(), &[])
            && let [saved] = saved.stages.as_slice()
        {
            differences = self.differences(&saved.fingerprint(), &self.settings);
        }
        let only = |lines: &Lines, keep: &dyn Fn(&str) -> bool| -> Lines {
            lines.iter().filter(|(name, _)| keep(name)).cloned().collect()
        };
        // The older build read models that an algorithm does not use, and kept no hash of what this one adds.
        let unused = |name: &str| {
            let loaded = self.content.iter().any(|(n, _)| n == name);
            !loaded && (name == REFERENCE || name == REWARD_MODEL && !self.learns_online)
        };
        let then = only(legacy, &|name| UNCHANGED.contains(&name) || CONTENT.contains(&name) && !unused(name));
        let mut now = only(&self.content, &|name| CONTENT.contains(&name));
        now.extend(only(&self.settings, &|name| UNCHANGED.contains(&name)));
        let more = self.differences(&then, &now);
        for difference in more {
            if !differences.iter().any(|d: &Difference| d.name == difference.name) {
                differences.push(difference);
            }
        }
        changed(directory, &differences)
    }

    /// Names whose values differ. A setting that came with a newer build was at its default before.
    fn differences(&self, then: &Lines, now: &Lines) -> Vec<Difference> {
        let (then, now) = (by_name(then), by_name(now));
        let names = then.keys().chain(now.keys().filter(|name| !then.contains_key(*name)));
        names
            .filter_map(|name| {
                let value = |all: &BTreeMap<&str, Vec<&str>>| all.get(name).map(|values| values.join(", "));
                let (then, now) = (value(&then), value(&now));
                let new_default = then.is_none() && now.as_ref() == self.defaults.get(*name);
                (then != now && !new_default).then(|| Difference { name: name.to_string(), then, now })
            })
            .collect()
    }
}

/// A setting or content that differs; `None` where it is absent.
struct Difference {
    name: String,
    then: Option<String>,
    now: Option<String>,
}

fn by_name(lines: &Lines) -> BTreeMap<&str, Vec<&str>> {
    let mut all: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, value) in lines {
        all.entry(name).or_default().push(value);
    }
    all
}

fn changed(directory: &Path, differences: &[Difference]) -> Result<()> {
    if differences.is_empty() {
        return Ok(());
    }
    let show = |value: &Option<String>| value.clone().unwrap_or_else(|| "(absent)".into());
    let line = |d: &Difference| format!("  {}\n    then: {}\n    now:  {}", d.name, show(&d.then), show(&d.now));
    let differences: Vec<String> = differences.iter().map(line).collect();
    Err(Error::Changed { directory: directory.into(), differences: differences.join("\n") })
}
