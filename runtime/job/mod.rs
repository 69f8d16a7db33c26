//! A job from the outside: its configuration, builder, chain of stages, and what a resume compares.

mod chain;
mod check;
mod config;
mod fingerprint;
mod handle;
#[allow(clippy::module_inception)]
mod job;
mod metrics;
mod origin;
mod saved;
mod view;

pub use chain::Chain;
pub use check::Checked;
pub use config::Config;
pub use handle::JobHandle;
pub use job::{Job, JobBuilder};
pub use saved::CONFIG_FILE;
pub(crate) use saved::{saved_config, saved_day};
