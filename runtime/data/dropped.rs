//! Rows that cannot be used, and counts of those left out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Rows left out, by reason. A reason completes a sentence that begins with the row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Dropped(pub BTreeMap<String, DroppedRows>);

/// Rows left out for one reason.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DroppedRows {
    /// Number of rows.
    pub rows: u64,
    /// Place of the first, as `line 7`; empty if it is unknown.
    pub first: String,
}

impl Dropped {
    /// Counts a row.
    pub(super) fn add(&mut self, reason: String, place: &str) {
        let entry = self.0.entry(reason).or_default();
        entry.rows += 1;
        if entry.first.is_empty() {
            entry.first = place.to_string();
        }
    }

    /// Counts rows whose places are not known.
    pub(crate) fn add_rows(&mut self, reason: &str, rows: u64) {
        if rows > 0 {
            self.0.insert(reason.into(), DroppedRows { rows, first: String::new() });
        }
    }

    /// Number of rows for all reasons.
    pub fn total(&self) -> u64 {
        self.0.values().map(|d| d.rows).sum()
    }

    /// All reasons in one line, for an error.
    pub(super) fn summary(&self) -> String {
        let reasons = self.0.iter().map(|(reason, d)| format!("{} {reason} ({} first)", d.rows, d.first));
        reasons.collect::<Vec<_>>().join(", ")
    }
}

/// Why a row cannot be used.
pub(crate) enum Unusable {
    /// The row is malformed; the reason completes a sentence that begins with the row.
    Bad(String),
    /// The row has more tokens than allowed.
    Long { tokens: usize },
}

impl From<String> for Unusable {
    fn from(reason: String) -> Self {
        Self::Bad(reason)
    }
}
