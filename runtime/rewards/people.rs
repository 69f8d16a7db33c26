//! People who rank completions in a browser, as a source of rewards: `[people]`.

use std::net::SocketAddr;

use super::source::{LoadedReward, RewardInputs, RewardSource};
use crate::config::{Keys, Range, Settings};
use crate::error::{Error, Result};
use crate::features::LABEL;
#[cfg(feature = "label")]
use crate::label;

/// `[people]`
#[derive(Debug, Clone, PartialEq)]
pub struct PeopleSource {
    /// Where the page is served; without it nobody is asked.
    pub listen: Option<SocketAddr>,
    /// Environment variable with the token.
    pub token_env: Option<String>,
    /// Labels that every prompt waits for.
    pub labels: usize,
    /// Weight of their score beside other sources.
    pub weight: f64,
}

impl Default for PeopleSource {
    fn default() -> Self {
        Self { listen: None, token_env: None, labels: 1, weight: 1.0 }
    }
}

impl Settings for PeopleSource {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("people");
        s.speed().parsed(
            "listen",
            &mut self.listen,
            "an address such as \"127.0.0.1:8765\"",
            "an address with a port, such as \"127.0.0.1:8765\"",
            "Serve a page there on which people rank the policy's completions; the job waits for them. An address beyond this \
             machine needs a token, which is made and shown where `token_env` names none.",
        );
        if self.listen.is_some() {
            s.requires("listen", LABEL.enabled, LABEL);
        }
        let help = "Environment variable with a token of 16 characters or more; it is never stored or logged.";
        s.speed().text("token_env", &mut self.token_env, "a variable's name", help);
        let help = "People whose ranking every prompt waits for; their scores are averaged.";
        s.integer("labels", &mut self.labels, Range::within(1.0, 100.0), help);
        s.number("weight", &mut self.weight, Range::any(), "Weight of their score beside other sources.");
    }
}

impl RewardSource for PeopleSource {
    fn name(&self) -> &'static str {
        "people"
    }

    fn is_configured(&self) -> bool {
        self.listen.is_some()
    }

    #[cfg(feature = "label")]
    fn load(&self, _: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        let listen = self.listen.ok_or_else(|| Error::Internal("people without an address".into()))?;
        let access = label::Access::from_env(listen, self.token_env.as_deref())?;
        // Bound before the job writes anything.
        let bound = crate::listen::bind(label::WHAT, "people.listen", listen)?;
        Ok(Box::new(page::Loaded { bound, access, settings: self.clone() }))
    }

    #[cfg(not(feature = "label"))]
    fn load(&self, _: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        Err(Error::Usage(format!("`people.listen` needs {LABEL}")))
    }
}

#[cfg(feature = "label")]
mod page {
    use std::sync::Arc;

    use super::PeopleSource;
    use crate::error::Result;
    use crate::events::{Event, tell};
    use crate::futures::BoxFuture;
    use crate::judge::ReplyCache;
    use crate::label::people::CachedLabels;
    use crate::label::{self, Access, LabelQueue, LabelService, PeopleReward};
    use crate::listen::Bound;
    use crate::rewards::memory::StoreMemory;
    use crate::rewards::source::{LoadedReward, RewardContext, StartedReward};

    pub struct Loaded {
        pub bound: Bound,
        pub access: Access,
        pub settings: PeopleSource,
    }

    impl LoadedReward for Loaded {
        fn start<'a>(self: Box<Self>, context: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>> {
            Box::pin(async move {
                let Loaded { bound, access, settings } = *self;
                let memory: Arc<dyn ReplyCache> = Arc::new(StoreMemory::new(context.archivist.clone()));
                let queue = LabelQueue::new(settings.labels);
                let service = Arc::new(LabelService::new(queue, Box::new(CachedLabels(memory.clone()))));
                let served = label::serve_on(bound, service.clone(), access.clone(), true)?;
                let url = access.url(served.address);
                tell(&context.events, Event::PeopleWanted { url });
                let people = PeopleReward::new(service, memory, context.stop.clone(), context.meters.clone());
                Ok(StartedReward { guard: Some(Box::new(served)), ..StartedReward::new(settings.weight, people) })
            })
        }
    }
}
