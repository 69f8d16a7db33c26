//! A person's ranking in place of a judge's.

use rehearsal_store::{OVERRULES, Preference, Store};
use serde::{Deserialize, Serialize};

use crate::data::ledger::{judge_name, ranked, valid_name};
use crate::error::{Error, Result};
use crate::time::now_ms;

/// A person's ranking of the completions of a ledger's record.
///
/// It is added to the ledger under the person's name. What is read from the ledger to train on takes it in place of the
/// record that it overrules; a running job does not change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overrule {
    /// Step of the record.
    pub step: u64,
    /// Index of the record in its step.
    pub index: u32,
    /// Name of the person, without surrounding spaces: 1 to 40 characters.
    pub person: String,
    /// Rank of each completion, in the record's order; 1 is best, ties share a rank.
    pub ranks: Vec<u32>,
}

impl Overrule {
    /// The record to write.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if there is no such record, it has fewer than two completions, or name or ranks are invalid.
    pub(crate) fn record(&self, store: &Store) -> Result<Preference> {
        let Self { step, index, person, ranks } = self;
        let wrong = |what: String| Error::Usage(format!("the ranking of record {index} of step {step} {what}"));
        let name = valid_name(person).map_err(|reason| wrong(format!("has no valid name; {reason}")))?;
        let original = store.preferences_of_step(*step)?.into_iter().find(|p| p.index == *index);
        let original = original.filter(|p| p.overrules().is_none() && p.completions.len() > 1);
        let original = original.ok_or_else(|| wrong("is of no record that compares completions".into()))?;
        let n = original.completions.len();
        if ranks.len() != n || ranks.iter().any(|rank| !(1..=n as u32).contains(rank)) {
            return Err(wrong(format!("must have {n} ranks from 1 to {n}")));
        }
        let scores = ranks.iter().map(|rank| (n as u32 - rank) as f64).collect();
        let Preference { prompt, completions, row, policy_version, .. } = original;
        let record = ranked(prompt, completions, scores, judge_name(name));
        Ok(Preference { step: *step, index: index + OVERRULES, row, policy_version, time_ms: now_ms(), ..record })
    }
}
