//! Packed sequences that share a prompt.

use std::ops::Range;

/// Rows of sequences that share a prompt, in a packed batch: those of the prompt, which exist once, and of each completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Family {
    /// Rows of the prompt.
    pub prompt: Range<usize>,
    /// Rows of each completion.
    pub completions: Vec<Range<usize>>,
}

impl Family {
    /// A sequence that does not share its prompt.
    pub fn alone(tokens: Range<usize>) -> Self {
        Self { prompt: tokens.start..tokens.start, completions: std::iter::once(tokens).collect() }
    }

    /// `(prefix, part)` for the prompt and each completion: the rows that come before the part, and its own.
    pub(super) fn parts(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
        let prompt = self.prompt.clone();
        std::iter::once((0..0, prompt.clone())).chain(self.completions.iter().map(move |c| (prompt.clone(), c.clone())))
    }
}
