//! One page for each algorithm.

mod online_dpo;

pub(crate) use online_dpo::online_dpo;
