//! Rehearsal aligns language models inside a Rust program.
//!
//! A [`Job`] is a [`Config`], something that knows better than the model (a [`Reward`]), and a directory. It runs
//! on the host's tokio runtime, tells what happens as typed [`Event`]s, records metrics where the host wants them,
//! stops politely, and goes on after any crash as if nothing had happened.
//!
//! ```no_run
//! # async fn f() -> Result<(), Box<dyn std::error::Error>> {
//! use rehearsal::{Config, Job, RewardFn, Sample};
//!
//! let config = Config::from_toml("[job]\ndirectory = \"runs/brief\"\nsteps = 40", ".".as_ref())?;
//! let brief = RewardFn::new("brief", |s: &Sample| Ok::<_, String>(-(s.tokens as f64)));
//! let outcome = Job::builder(config).reward(brief).build()?.run(Default::default()).await?;
//! println!("{} of {} steps", outcome.step, outcome.steps);
//! # Ok(())
//! # }
//! ```

pub mod access;
pub mod algorithms;
mod blocking;
#[cfg(feature = "cli")]
pub mod cli;
pub mod config;
pub mod data;
pub mod driver;
pub mod embedded;
mod error;
pub mod evaluate;
mod events;
#[cfg(feature = "prometheus")]
pub mod exporter;
mod features;
mod futures;
mod heap;
#[cfg(feature = "prometheus")]
mod http;
mod job;
pub mod judge;
#[cfg(feature = "label")]
pub mod label;
#[cfg(any(feature = "label", feature = "prometheus"))]
mod listen;
mod memory;
pub mod metrics;
mod models;
mod readiness;
pub mod rewards;
pub mod settings;
mod status;
mod summary;
mod time;
pub mod transformers;

pub use access::{Generate, Generated, JobReader, WeightType};
pub use algorithms::Algorithms;
pub use config::{ConfigError, Keys, Range, Settings};
pub use data::{DataSettings, Dropped, DroppedRows, OnBad, OnLong, PromptsSettings};
pub use driver::{
    Algorithm, AlgorithmSettings, JobState, LoadedAlgorithm, Loader, RolloutInputs, RolloutSettings, Rollouts, Run,
    Starter, Stats, Step, Updates, rollout_stats,
};
pub use error::{Error, ErrorKind, Result};
pub use events::{Event, NewCompletion, Outcome, ScoredText};
pub use futures::BoxFuture;
pub use heap::use_one_arena;
pub use job::{CONFIG_FILE, Chain, Config, Job, JobBuilder, JobHandle};
pub use memory::MemoryBudget;
pub use metrics::Metric;
pub use readiness::Readiness;
pub use rehearsal_actors as actors;
pub use rehearsal_actors::{Devices, Judged, Reward, RewardError, RewardFn, Sample};
pub use rehearsal_learn as learn;
pub use rehearsal_lm as lm;
pub use rehearsal_store as store;
pub use rewards::{BlockingScorerFn, OnFailure, Scorer, ScorerFn, ScorerPolicy};
pub use settings::Common;
pub use status::{JobStatus, MemoryUse};
pub use summary::{Answer, Counters, Evaluation, Seconds, StepSummary};
pub use tokio_util::sync::CancellationToken;
