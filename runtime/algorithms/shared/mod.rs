//! What several algorithms share.

pub mod minibatches;
pub mod offline;
pub mod online;
pub mod pairs;
pub mod preference;
pub mod rounds;
