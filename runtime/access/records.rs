//! Reads of a store, for a job that runs and for one that does not.

use rehearsal_store::{Query, Result, Store};

use super::request::{PAGE, Reply, Rollouts, Verified};

/// The checkpoints that can be restored, oldest first.
pub fn checkpoints(store: &Store) -> Result<Reply> {
    Ok(Reply::Checkpoints(store.checkpoints()?))
}

/// The records that match a query after the one of that step and index, at most [`PAGE`].
pub fn preferences(store: &Store, mut query: Query, after: Option<(u64, u32)>) -> Result<Reply> {
    if let Some((step, _)) = after {
        let steps = query.steps.unwrap_or(0..u64::MAX);
        query.steps = Some(steps.start.max(step)..steps.end);
    }
    let is_later = |p: &rehearsal_store::Preference| after.is_none_or(|last| (p.step, p.index) > last);
    let records = store.query(query)?.filter(|p| p.as_ref().map_or(true, is_later)).take(PAGE);
    Ok(Reply::Preferences(records.collect::<Result<_>>()?))
}

/// The logged completions and scores of a step.
pub fn rollouts(store: &Store, step: u64) -> Result<Reply> {
    Ok(Reply::Rollouts(Rollouts { completions: store.rollouts(step)?, scores: store.scores(step)? }))
}

/// Verifies every checksum.
pub fn verify(store: &Store) -> Result<Reply> {
    let (damaged, intact) = store.verify()?;
    Ok(Reply::Verified(Verified { intact, damaged }))
}
