//! What is wrong with a configuration.

use std::fmt;
use std::path::PathBuf;

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1; 0 where there is none.
    pub line: usize,
    /// What is wrong and what to do, as Markdown.
    pub message: String,
}

/// Everything wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, or a description of where the configuration comes from.
    pub file: PathBuf,
    /// Sorted by line, without repetitions.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// Problems of a configuration that is not (or not yet known to be) a file's: sorted by line, without repetitions.
    pub fn new(problems: Vec<Problem>) -> Self {
        let mut once: Vec<Problem> = Vec::new();
        for problem in problems {
            if !once.contains(&problem) {
                once.push(problem);
            }
        }
        once.sort_by_key(|p| p.line);
        let problems = once;
        Self { file: "the configuration".into(), problems }
    }

    /// The same problems, in a file.
    pub fn in_file(self, file: &std::path::Path) -> Self {
        Self { file: file.into(), ..self }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.problems.len();
        write!(f, "{}: {n} problem{}", self.file.display(), if n == 1 { "" } else { "s" })?;
        for problem in &self.problems {
            write!(f, "\n  ")?;
            if problem.line > 0 {
                write!(f, "line {}: ", problem.line)?;
            }
            write!(f, "{}", problem.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
