//! Rehearsal aligns language models inside a Rust program.
//!
//! A [`Job`] is a [`Config`], a source of rewards or preferences, and a directory. It runs on the host's tokio runtime,
//! tells what happens as typed [`Event`]s, records metrics where the host wants them, and can be paused, read, asked and
//! stopped while it runs. Kill the process at any instant: the resumed job ends with the same weights, bit for bit.
//!
//! ```no_run
//! # async fn f() -> Result<(), Box<dyn std::error::Error>> {
//! use rehearsal::{Config, Job, Sample, ScorerFn, ScorerPolicy};
//!
//! let mut config = Config::new("runs/brief");
//! config.common.job.steps = 40;
//! let brief = ScorerFn::new("brief", |s: Sample| async move { Ok::<_, String>(-(s.tokens as f64)) });
//! let job = Job::builder(config).scorer(brief, ScorerPolicy::default()).start_or_resume().await?;
//! let outcome = job.wait().await?;
//! println!("{} of {} steps", outcome.step, outcome.steps);
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! | to | use |
//! | --- | --- |
//! | configure a job | [`Config`]: read from TOML, or built in Rust; `docs/config.md` lists every key |
//! | run it | [`Job::builder`], [`JobBuilder::start`], [`JobBuilder::start_or_resume`]; [`Chain`] for several stages |
//! | hold it while it runs | [`JobHandle`] |
//! | read it from anywhere, running or not | [`JobReader`] |
//! | score completions | [`ScorerFn`], [`BlockingScorerFn`], [`Scorer`]; [`Reward`] and [`RewardFn`] for whole batches |
//! | bring an algorithm | [`Algorithms`], [`AlgorithmSettings`], [`Algorithm`], [`Run`], [`Rollouts`] |
//! | run several jobs | [`JobBuilder::name`], [`JobBuilder::devices`], [`use_one_arena`] |
//! | sort errors | [`Error::kind`] |
//!
//! `docs/tutorials` leads through each; their code is tested.
//!
//! # What the host should set
//!
//! Dependencies are not optimised in the dev profile, and a step then takes tens of times longer ([`Event::SlowBuild`] says so).
//! Add `[profile.dev.package."*"]` with `opt-level = 3` to the program's `Cargo.toml`. The tokio runtime needs the features
//! `rt-multi-thread`, `time` and `net`.

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
#[cfg(any(feature = "label", feature = "prometheus", feature = "view"))]
mod http;
mod job;
pub mod judge;
#[cfg(feature = "label")]
pub mod label;
#[cfg(any(feature = "label", feature = "nodes", feature = "prometheus", feature = "view"))]
mod listen;
mod memory;
pub mod metrics;
mod model_directory;
mod models;
mod nodes;
mod readiness;
pub mod rewards;
pub mod settings;
mod status;
mod summary;
mod time;
pub mod transformers;
#[cfg(feature = "view")]
pub mod view;
#[cfg(any(feature = "label", feature = "view"))]
mod web;

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
pub use job::{CONFIG_FILE, Chain, Checked, Config, Job, JobBuilder, JobHandle};
pub use memory::MemoryBudget;
pub use metrics::Metric;
pub use nodes::{Credentials, NodesSettings};
#[cfg(feature = "nodes")]
pub use nodes::{NodeEvent, NodeOptions, make_certificates, run_node};
pub use readiness::Readiness;
pub use rehearsal_actors as actors;
pub use rehearsal_actors::{Devices, Judged, Reward, RewardError, RewardFn, Sample};
pub use rehearsal_learn as learn;
pub use rehearsal_lm as lm;
pub use rehearsal_store as store;
pub use rewards::{BlockingScorerFn, OnFailure, Scorer, ScorerFn, ScorerPolicy};
pub use settings::Common;
pub use status::{JobStatus, MemoryUse, Waiting};
pub use summary::{Answer, Counters, Evaluation, Seconds, StepSummary};
pub use tokio_util::sync::CancellationToken;

/// The tutorials, as tests.
#[cfg(all(doctest, feature = "prometheus"))]
mod tutorials {
    #[doc = include_str!("../docs/tutorials/first_reward.md")]
    struct FirstReward;
    #[doc = include_str!("../docs/tutorials/embedding.md")]
    struct Embedding;
}
