//! Reads of a store, for a job that runs and for one that does not.

use rehearsal_store::{Query, Result, Store};

use super::request::{BRIEF_PAGE, Brief, PAGE, Reply, Rollouts, Verified};

/// The checkpoints that can be restored, oldest first.
pub fn checkpoints(store: &Store) -> Result<Reply> {
    Ok(Reply::Checkpoints(store.checkpoints()?))
}

/// The first records that match a query, at most [`PAGE`].
pub fn preferences(store: &Store, query: Query) -> Result<Reply> {
    Ok(Reply::Preferences(store.query(query)?.take(PAGE).collect::<Result<_>>()?))
}

/// The first records that match a query in brief, at most [`BRIEF_PAGE`].
pub fn brief(store: &Store, query: Query) -> Result<Reply> {
    let records = store.query(query)?.take(BRIEF_PAGE);
    Ok(Reply::Brief(records.map(|p| p.map(|p| Brief::from(&p))).collect::<Result<_>>()?))
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
