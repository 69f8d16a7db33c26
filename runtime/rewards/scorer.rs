//! A scorer behind HTTP as a source of rewards: `[scorer]`.

use super::endpoint::EndpointSettings;
use super::source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
use crate::config::{Keys, Range, Settings};
use crate::error::{Error, Result};
use crate::futures::BoxFuture;
use crate::judge::{Endpoint, HttpScorer};

/// `[scorer]`
#[derive(Debug, Clone, PartialEq)]
pub struct ScorerSource {
    /// How the server is reached.
    pub endpoint: EndpointSettings,
    /// Samples of one request.
    pub batch: usize,
    /// Weight of its score beside other sources.
    pub weight: f64,
}

impl Default for ScorerSource {
    fn default() -> Self {
        Self { endpoint: EndpointSettings::default(), batch: 16, weight: 1.0 }
    }
}

impl Settings for ScorerSource {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("scorer");
        self.endpoint.visit(
            &mut s,
            "A server that receives `{\"samples\": [{\"prompt\", \"completion\", \"answer\"}]}` and replies \
             `{\"scores\": [..]}`.",
        );
        s.speed().integer("batch", &mut self.batch, Range::from(1.0), "Samples of one request.");
        s.number("weight", &mut self.weight, Range::any(), "Weight of its score beside other sources.");
    }
}

impl RewardSource for ScorerSource {
    fn name(&self) -> &'static str {
        "scorer"
    }

    fn is_configured(&self) -> bool {
        self.endpoint.url.is_some()
    }

    fn load(&self, _: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        let endpoint = self
            .endpoint
            .endpoint()
            .ok_or_else(|| Error::RewardSource { name: "scorer", reason: "`scorer.url` is missing".into() })?;
        Ok(Box::new(Loaded { endpoint, batch: self.batch, weight: self.weight }))
    }
}

struct Loaded {
    endpoint: Endpoint,
    batch: usize,
    weight: f64,
}

impl LoadedReward for Loaded {
    fn start<'a>(self: Box<Self>, context: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>> {
        Box::pin(async move {
            let scorer = HttpScorer::new(self.endpoint, self.batch, context.stop.clone())
                .map_err(|reason| Error::RewardSource { name: "scorer", reason })?;
            Ok(StartedReward::new(self.weight, scorer))
        })
    }
}
