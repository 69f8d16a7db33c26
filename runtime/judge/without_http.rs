//! In place of judges and scorers behind HTTP, in a build without the feature `http`: types that cannot be made.

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use tokio_util::sync::CancellationToken;

use super::endpoint::{ApiSettings, Endpoint};
use super::question::{Judge, Question, Reply};
use crate::features::HTTP;

/// A judge behind HTTP; none exists in this build.
pub enum ApiJudge {}

impl ApiJudge {
    /// Fails.
    pub fn new(_: ApiSettings, _: Endpoint, _: CancellationToken) -> Result<Self, String> {
        Err(format!("a judge behind a URL needs {HTTP}"))
    }
}

impl Judge for ApiJudge {
    fn id(&self) -> &str {
        match *self {}
    }

    fn ask(&self, _: &[Question]) -> Result<Vec<Reply>, RewardError> {
        match *self {}
    }
}

/// A scorer behind HTTP; none exists in this build.
pub enum HttpScorer {}

impl HttpScorer {
    /// Fails.
    pub fn new(_: Endpoint, _: usize, _: CancellationToken) -> Result<Self, String> {
        Err(format!("a scorer behind a URL needs {HTTP}"))
    }
}

impl Reward for HttpScorer {
    fn name(&self) -> &str {
        match *self {}
    }

    fn score(&self, _: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        match *self {}
    }
}
