//! From prompts to scored completions.

mod ahead;
mod collect;
mod collector;
mod completion;
mod evaluation;
mod overlap;
mod preferences;
mod schedule;
mod settings;
mod stats;

pub use collect::{RolloutInputs, Rollouts};
pub(crate) use schedule::Schedule;
pub use settings::{RolloutSettings, recorded_tokens};
pub use stats::{generated_tokens, log_ratio, rollout_stats};
