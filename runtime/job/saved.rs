//! The copy of a configuration that a job keeps in its directory.

use std::fs;
use std::path::Path;

use super::config::Config;
use crate::error::{At, Result};

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
pub fn read(directory: &Path) -> Result<Option<Saved>> {
    let copy = directory.join(CONFIG_FILE);
    if !copy.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&copy).at(&copy)?;
    let find = |key: &str| text.lines().take(2).find_map(|line| line.strip_prefix(key));
    let base = find(BASE).unwrap_or(".").to_string();
    let stage: Option<usize> = find(STAGE).and_then(|n| n.parse().ok());
    let mut stages = Config::stages(&text, Path::new(&base)).map_err(|e| e.in_file(&copy))?;
    match stage {
        Some(stage) if stage < stages.len() => stages = vec![stages.swap_remove(stage)],
        _ => {}
    }
    if let [only] = stages.as_mut_slice() {
        only.common.job.directory = directory.into();
    }
    let source = text.lines().skip_while(|line| line.starts_with(BASE) || line.starts_with(STAGE));
    Ok(Some(Saved { stages, source: source.collect::<Vec<_>>().join("\n"), base }))
}
