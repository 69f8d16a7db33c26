//! The keys of a server's endpoint, which several sources have.

use std::time::Duration;

use crate::config::{Range, Section};
use crate::features::HTTP;
use crate::judge::Endpoint;

/// Keys of a section that say how a server is reached.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointSettings {
    /// Without one there is no server.
    pub url: Option<String>,
    /// Environment variable with a bearer token.
    pub token_env: Option<String>,
    /// Time limit of one request.
    pub timeout: Duration,
    /// Attempts after the first.
    pub retries: u32,
    /// Go on trying after the last retry.
    pub wait: bool,
    /// Requests in flight at a time.
    pub concurrency: usize,
}

impl Default for EndpointSettings {
    fn default() -> Self {
        Self { url: None, token_env: None, timeout: Duration::from_secs(60), retries: 5, wait: false, concurrency: 4 }
    }
}

impl EndpointSettings {
    /// Visits the keys; `help` says what answers at `url`.
    pub fn visit(&mut self, s: &mut Section<'_>, help: &'static str) {
        s.speed().text("url", &mut self.url, "a URL", help);
        let help = "Environment variable with a bearer token; the token is never stored or logged.";
        s.speed().text("token_env", &mut self.token_env, "a variable's name", help);
        s.speed().seconds("timeout_seconds", &mut self.timeout, Range::from(1.0), "Time limit of one request.");
        let help = "Times a failed request is tried again, after pauses that double from a quarter of a second.";
        s.speed().integer("retries", &mut self.retries, Range::within(0.0, 1000.0), help);
        let choices = [("fail", false), ("wait", true)];
        s.speed().choice(
            "unreachable",
            &mut self.wait,
            &choices,
            "After the last retry: end the job, or go on trying.",
        );
        let help = "Requests in flight at a time.";
        s.speed().integer("concurrency", &mut self.concurrency, Range::within(1.0, 256.0), help);
        if self.url.is_some() {
            s.requires("url", HTTP.enabled, HTTP);
        }
        if let Some(url) = self.url.as_deref().filter(|u| !(u.starts_with("http://") || u.starts_with("https://"))) {
            s.problem("url", format!("= \"{url}\" must begin with http:// or https://"));
        }
    }

    /// The endpoint, if there is one.
    pub fn endpoint(&self) -> Option<Endpoint> {
        Some(Endpoint {
            url: self.url.clone()?,
            token_env: self.token_env.clone(),
            timeout: self.timeout,
            retries: self.retries,
            wait: self.wait,
            concurrency: self.concurrency,
        })
    }
}
