//! Evaluations: reward models and judges against labelled pairs, two models against each other, and ratings of many
//! models.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use rehearsal::evaluate;
//! use rehearsal::lm::{Checkpoint, Precision};
//!
//! let model = Checkpoint::open("runs/reward_model/model".as_ref())?;
//! let report = evaluate::reward_model(&model, "pairs.jsonl".as_ref(), Precision::F32, 0)?;
//! println!("{} of {} pairs", report.accuracy, report.pairs);
//! # Ok(())
//! # }
//! ```

mod html;
mod judge;
mod models;
mod ratings;
mod reward_model;
mod rows;

pub use html::html;
pub use judge::{JudgeReport, judge_agreement};
pub use models::{CompareOptions, ModelReport, PromptResult, compare};
pub use ratings::{RatingReport, ratings};
pub use reward_model::{PairReport, reward_model};
