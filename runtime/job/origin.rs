//! What a job's directory says of itself: the version of its format, the version of the arithmetic that its results have,
//! and where its configuration came from.

use std::fs;
use std::path::Path;

use rehearsal_store::{Disk, replace_durably};
use serde::{Deserialize, Serialize};

use crate::error::{At, Error, Result};
use crate::time::today;

/// Name of the file in a job's directory. Jobs of versions before it have two comment lines in `job.toml` instead.
pub const ORIGIN_FILE: &str = "origin.json";

/// Version of the layout of a job's directory that this program writes; it reads all up to it.
const FORMAT: u32 = 2;

/// Version of the arithmetic, which a fix that changes results raises. A job keeps the version that it was begun with.
///
/// - 2: a reward model with another tokenizer than the policy's reads completions as it was trained; the reference of a
///   policy that starts from `lora.adapter` is the policy as it starts, and not its base; chat templates that print the date
///   print the day on which the job began.
const RESULTS: u32 = 2;

/// Oldest arithmetic that this program can still do, with the release to resume older jobs with.
const RESULTS_MIN: (u32, &str) = (1, "0.1.0");

/// Key of a header's line with the folder that paths are relative to, in copies of older versions.
const BASE: &str = "# base = ";
/// Key of a header's line with the number of the stage, in copies of older versions.
const STAGE: &str = "# stage = ";

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub format: u32,
    pub results: u32,
    /// The day on which the job began, in days after 1 January 1970: the date that chat templates print. Jobs of results 1
    /// have none.
    #[serde(default)]
    pub day: Option<u32>,
    /// Folder that relative paths of the configuration are relative to.
    pub base: String,
    /// The stage that works in the directory, of several in the document.
    pub stage: Option<usize>,
}

impl Origin {
    /// Of a job that this program begins.
    pub fn new(base: impl Into<String>, stage: Option<usize>) -> Self {
        Self { format: FORMAT, results: RESULTS, day: Some(today()), base: base.into(), stage }
    }

    /// Of a directory, whose copy of the configuration is `copy`. Returns the document without the header of older versions
    /// beside it.
    ///
    /// # Errors
    ///
    /// If the directory was written by a newer version, or its results belong to arithmetic that this version cannot do.
    pub fn of(directory: &Path, copy: &str) -> Result<(Self, String)> {
        let path = directory.join(ORIGIN_FILE);
        let origin: Self = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::SavedState { reason: format!("{} is damaged: {e}", path.display()) })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let find = |key: &str| copy.lines().take(2).find_map(|line| line.strip_prefix(key));
                let (base, stage) = (find(BASE).unwrap_or("."), find(STAGE).and_then(|n| n.parse().ok()));
                Self { format: 0, results: 1, day: None, base: base.into(), stage }
            }
            Err(e) => return Err(e).at(&path),
        };
        origin.check(directory)?;
        let is_header = |line: &&str| line.starts_with(BASE) || line.starts_with(STAGE);
        let document: Vec<&str> = copy.lines().skip_while(is_header).collect();
        Ok((origin, document.join("\n")))
    }

    fn check(&self, directory: &Path) -> Result<()> {
        let directory = directory.display();
        let refused = |reason: String| Err(Error::SavedState { reason });
        if self.format > FORMAT || self.results > RESULTS {
            let Self { format, results, .. } = self;
            return refused(format!(
                "{directory} was written by a newer version of this program (format {format}, results {results}; this one \
                 knows up to {FORMAT} and {RESULTS})"
            ));
        }
        let (oldest, release) = RESULTS_MIN;
        if self.results < oldest {
            return refused(format!(
                "the job in {directory} was begun with the arithmetic of an older version (results {}), which this one does \
                 not have; version {release} is the last that does",
                self.results
            ));
        }
        Ok(())
    }

    /// Writes it into a directory; an earlier one is there until the new one is whole.
    pub fn save(&self, directory: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Internal(e.to_string()))?;
        keep(&directory.join(ORIGIN_FILE), &(text + "\n"))
    }
}

/// Replaces a file durably, in one move.
pub fn keep(path: &Path, text: &str) -> Result<()> {
    replace_durably(&Disk, path, text.as_bytes()).at(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_says_its_version_and_a_newer_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, document) = (folder.path(), "[job]\nsteps = 2");
        // Copies of older versions have a header.
        let old = format!("{BASE}/data\n{STAGE}1\n{document}");
        let (origin, rest) = Origin::of(directory, &old).unwrap();
        assert_eq!(
            (origin.base.as_str(), origin.stage, origin.results, rest.as_str()),
            ("/data", Some(1), 1, document)
        );
        let new = Origin::new("/elsewhere", None);
        new.save(directory).unwrap();
        assert_eq!(Origin::of(directory, document).unwrap(), (new.clone(), document.to_string()));
        for (format, results) in [(FORMAT + 1, RESULTS), (FORMAT, RESULTS + 1)] {
            Origin { format, results, ..new.clone() }.save(directory).unwrap();
            let error = Origin::of(directory, document).unwrap_err().to_string();
            assert!(error.contains("newer version") && error.contains(&directory.display().to_string()), "{error}");
        }
        Origin { results: 0, ..new }.save(directory).unwrap();
        let error = Origin::of(directory, document).unwrap_err().to_string();
        assert!(error.contains("version 0.1.0 is the last that does"), "{error}");
        fs::write(directory.join(ORIGIN_FILE), "{").unwrap();
        assert!(Origin::of(directory, document).unwrap_err().to_string().contains("damaged"));
    }
}
