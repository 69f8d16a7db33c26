//! `[judge]` and `[scorer]`: a language model as judge (Zheng et al. 2023; Lee et al. 2023; Guo et al. 2024), and an
//! HTTP server that scores.
//!
//! A [`Template`] renders completions into a [`Question`], a [`Judge`] replies, [`parse_verdict`] reads the reply, and
//! [`JudgeReward`] turns verdicts into scores: pairwise, by ranking or by grade. Replies are kept in a [`ReplyCache`].

#[cfg(feature = "http")]
mod api;
mod cache;
mod endpoint;
#[cfg(feature = "http")]
mod http;
mod local;
mod question;
mod reward;
mod template;
mod verdict;
#[cfg(not(feature = "http"))]
mod without_http;

#[cfg(feature = "http")]
pub use api::ApiJudge;
pub use cache::{Budget, ReplyCache};
pub use endpoint::{ApiSettings, Endpoint, LONGEST_WAIT, Prices};
#[cfg(feature = "http")]
pub use http::{HttpScorer, RequestError};
pub use local::{JudgeModel, LocalJudge};
pub use question::{Judge, Question, Reply};
pub use rehearsal_actors::{Devices, Placement};
#[cfg(feature = "label")]
pub(crate) use reward::same_prompt;
pub use reward::{JudgeReward, Mode, Orders};
pub use template::{NAMES, ReplyFormat, Template};
pub use verdict::{JudgeVerdict, QuestionKind, parse_verdict};
#[cfg(not(feature = "http"))]
pub use without_http::{ApiJudge, HttpScorer};

#[cfg(test)]
mod tests;
