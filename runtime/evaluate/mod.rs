//! Evaluations: reward models and judges against labelled pairs, two models against each other, and ratings of many
//! models.

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
