//! `[judge]` and `[scorer]`: a language model as judge (Zheng et al. 2023; Lee et al. 2023; Guo et al. 2024), and an
//! HTTP server that scores.
//!
//! A [`Template`] renders completions into a [`Question`], a [`Judge`] replies, [`parse_verdict`] reads the reply, and
//! [`JudgeReward`] turns verdicts into scores: pairwise, by ranking or by grade. Replies are kept in a [`ReplyCache`].

mod api;
mod cache;
mod http;
mod local;
mod question;
mod reward;
mod template;
mod verdict;

pub use api::{ApiJudge, ApiSettings, Prices};
pub use cache::{Budget, ReplyCache};
pub use http::{Endpoint, HttpScorer, NO_TIMEOUT, RequestError};
pub use local::{JudgeModel, LocalJudge};
pub use question::{Judge, Question, Reply};
pub use rehearsal_actors::{Devices, Placement};
pub(crate) use reward::same_prompt;
pub use reward::{JudgeReward, Mode, Orders};
pub use template::{NAMES, ReplyFormat, Template};
pub use verdict::{JudgeVerdict, QuestionKind, parse_verdict};

#[cfg(test)]
mod tests;
