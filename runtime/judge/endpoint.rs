//! How a server is reached, and what a judge behind one is asked for.

use std::time::Duration;

/// A server and the limits of requests to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    /// URL with `http://` or `https://`.
    pub url: String,
    /// Environment variable that holds a bearer token. The token is never logged or stored.
    pub token_env: Option<String>,
    /// Longest time of one attempt.
    pub timeout: Duration,
    /// Attempts after the first, on transient errors.
    pub retries: u32,
    /// Retry transient errors without limit.
    pub wait: bool,
    /// Most requests in flight.
    pub concurrency: usize,
}

/// Longest wait for people, and for a server that is to be waited for: 30 days.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Request settings of an [`ApiJudge`](super::ApiJudge).
#[derive(Debug, Clone, PartialEq)]
pub struct ApiSettings {
    /// Model name in the request.
    pub model: String,
    /// Longest reply, in tokens.
    pub tokens_max: usize,
    /// What requests cost.
    pub prices: Prices,
    /// Request a JSON object by schema (structured outputs) instead of text.
    pub structured: bool,
}

/// Price per million tokens, in any currency.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Prices {
    /// Of the question.
    pub input: f64,
    /// Of the reply.
    pub output: f64,
}
