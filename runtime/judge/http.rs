//! HTTP requests with a timeout, retries with exponential backoff, and bounded concurrency; a server as reward.

use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use super::endpoint::{Endpoint, LONGEST_WAIT};

/// Longest pause between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// Longest response that is read, in bytes, decompressed.
const RESPONSE_BYTES_MAX: usize = 1 << 20;

/// Pause before the first retry; it doubles with each.
const BACKOFF: Duration = Duration::from_millis(250);

/// Why a request failed after all its attempts.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestError {
    /// URL, reason and number of attempts.
    Failed(String),
    /// The job was stopped.
    Stopped,
}

impl RequestError {
    /// Converts to the error of the reward `name` on row `row`.
    pub fn into_reward_error(self, name: &str, row: u64) -> RewardError {
        match self {
            Self::Failed(reason) => RewardError::Failed { name: name.into(), row, reason },
            Self::Stopped => RewardError::Stopped { name: name.into() },
        }
    }
}

/// Why one attempt failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub(super) struct AttemptError {
    reason: String,
    /// Pause that the server requests by `Retry-After`.
    retry_after: Option<Duration>,
    /// A retry would fail in the same way.
    permanent: bool,
}

impl AttemptError {
    /// An error that a retry may overcome.
    pub fn transient(reason: String) -> Self {
        Self { reason, retry_after: None, permanent: false }
    }

    /// An error that no retry overcomes.
    pub fn permanent(reason: String) -> Self {
        Self { reason, retry_after: None, permanent: true }
    }

    /// The error of a response without success: transient for the statuses 408, 429 and 5xx.
    pub async fn of(response: reqwest::Response) -> Self {
        let status = response.status().as_u16();
        let retry_after = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok());
        if matches!(status, 408 | 429 | 500..=599) {
            return Self {
                retry_after: retry_after.map(Duration::from_secs),
                ..Self::transient(format!("the server answered with status {status}"))
            };
        }
        if let Some(to) = response.headers().get("location").filter(|_| (300..400).contains(&status)) {
            // Questions and token go to the server that was named, and to no other.
            let to = String::from_utf8_lossy(to.as_bytes()).into_owned();
            return Self::permanent(format!("the server redirects to {to}; if that is right, set it as the URL"));
        }
        let text = read(response).await.unwrap_or_default();
        let text: String = String::from_utf8_lossy(&text).chars().take(200).collect();
        Self::permanent(format!("the server answered with status {status}: {text}"))
    }
}

/// The body of a response, up to its limit.
async fn read(mut response: reqwest::Response) -> Result<Vec<u8>, AttemptError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > RESPONSE_BYTES_MAX {
            let limit = RESPONSE_BYTES_MAX >> 20;
            return Err(AttemptError::permanent(format!("the response is longer than {limit} MB and was not read")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// A response whose body has been read, up to its limit.
pub(super) async fn bounded(response: reqwest::Response) -> Result<reqwest::Response, AttemptError> {
    let status = response.status();
    let body = read(response).await?;
    let mut whole = http_types::Response::new(body);
    *whole.status_mut() = status;
    Ok(whole.into())
}

impl From<reqwest::Error> for AttemptError {
    fn from(error: reqwest::Error) -> Self {
        // The sources hold the cause, such as a refused connection or an unknown host name.
        let mut reason = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        Self::transient(reason)
    }
}

/// Blocking HTTP client of one endpoint. It has its own tokio runtime and must be called from threads outside any
/// runtime.
pub(super) struct RetryingClient {
    pub endpoint: Endpoint,
    pub http: reqwest::Client,
    /// Taken on drop and shut down in the background, because a runtime must not block on a thread of another one.
    runtime: Option<Runtime>,
    stop: CancellationToken,
}

impl RetryingClient {
    /// Cancelling `stop` ends requests in flight and pauses between retries.
    pub fn new(endpoint: Endpoint, stop: CancellationToken) -> Result<Self, String> {
        let http = reqwest::Client::builder()
            .timeout(endpoint.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| e.to_string())?;
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).thread_name("rehearsal-http").enable_all().build();
        Ok(Self { endpoint, http, runtime: Some(runtime.map_err(|e| e.to_string())?), stop })
    }

    /// [`LONGEST_WAIT`] if retries are without limit.
    pub fn timeout(&self) -> Option<Duration> {
        self.endpoint.wait.then_some(LONGEST_WAIT)
    }

    /// Bearer token from the environment, if one is configured.
    pub fn token(&self) -> Result<Option<String>, AttemptError> {
        let Some(name) = &self.endpoint.token_env else { return Ok(None) };
        let token =
            std::env::var(name).map_err(|_| AttemptError::permanent(format!("the environment has no {name}")))?;
        match reqwest::header::HeaderValue::from_str(&token) {
            Ok(_) => Ok(Some(token)),
            Err(_) => Err(AttemptError::permanent(format!(
                "the environment variable {name} holds characters that an HTTP header cannot carry"
            ))),
        }
    }

    /// Calls `attempt` until it succeeds, fails permanently, or has no retries left.
    pub fn with_retries<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, RequestError>
    where
        F: Future<Output = Result<T, AttemptError>>,
    {
        let Some(runtime) = &self.runtime else { return Err(RequestError::Stopped) };
        let Endpoint { url, retries, wait, .. } = &self.endpoint;
        runtime.block_on(async {
            let mut retried = 0;
            loop {
                let result = tokio::select! {
                    result = attempt() => result,
                    () = self.stop.cancelled() => return Err(RequestError::Stopped),
                };
                let AttemptError { reason, retry_after, permanent } = match result {
                    Ok(value) => return Ok(value),
                    Err(error) => error,
                };
                if permanent || (retried >= *retries && !wait) {
                    return Err(RequestError::Failed(format!("{url}: {reason}, after {} tries", retried + 1)));
                }
                tracing::warn!(url, reason, retried, "a request failed and is retried");
                let pause = retry_after.unwrap_or(BACKOFF * 2u32.saturating_pow(retried.min(16))).min(BACKOFF_MAX);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.stop.cancelled() => return Err(RequestError::Stopped),
                }
                retried += 1;
            }
        })
    }

    /// Applies `one` to all items on up to `endpoint.concurrency` threads, and returns the results in order. No item is
    /// started after a failure, which is returned.
    pub fn map_concurrently<I: Sync, T: Send>(
        &self,
        items: &[I],
        one: impl Fn(&I) -> Result<T, RequestError> + Sync,
    ) -> Result<Vec<T>, RequestError> {
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Result<T, RequestError>>>> = Mutex::new(items.iter().map(|_| None).collect());
        std::thread::scope(|scope| {
            for _ in 0..self.endpoint.concurrency.clamp(1, items.len().max(1)) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = items.get(i) else { break };
                        let result = one(item);
                        let failed = result.is_err();
                        done.lock().unwrap_or_else(|e| e.into_inner())[i] = Some(result);
                        if failed {
                            next.fetch_add(items.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let done = done.into_inner().unwrap_or_else(|e| e.into_inner());
        let mut all = Vec::with_capacity(items.len());
        for result in done {
            match result {
                Some(result) => all.push(result?),
                None => continue, // not started, because a later one failed
            }
        }
        if all.len() == items.len() { Ok(all) } else { Err(RequestError::Failed("a request was not sent".into())) }
    }
}

impl Drop for RetryingClient {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A server as reward. A request is `{"samples": [{"prompt", "completion", "answer"}]}`, its response `{"scores":
/// [..]}`, one number for each sample in order.
pub struct HttpScorer {
    client: RetryingClient,
    /// Most samples in one request.
    batch: usize,
}

impl HttpScorer {
    /// Requests hold up to `batch` samples. Cancelling `stop` ends them.
    pub fn new(endpoint: Endpoint, batch: usize, stop: CancellationToken) -> Result<Self, String> {
        Ok(Self { client: RetryingClient::new(endpoint, stop)?, batch: batch.max(1) })
    }

    /// Sends one request, without retries.
    async fn send(&self, samples: &[Sample]) -> Result<Vec<f64>, AttemptError> {
        let row = |s: &Sample| json!({"prompt": s.prompt, "completion": s.completion, "answer": s.answer});
        let body = json!({"samples": samples.iter().map(row).collect::<Vec<_>>()});
        let mut request = self.client.http.post(&self.client.endpoint.url).json(&body);
        if let Some(token) = self.client.token()? {
            request = request.bearer_auth(token);
        }
        let response = request.send().await?;
        if !response.status().is_success() {
            return Err(AttemptError::of(response).await);
        }
        let unusable = |reason: String| AttemptError::transient(format!("the response cannot be used: {reason}"));
        let body = read(response).await?;
        let answer: Value = serde_json::from_slice(&body)
            .map_err(|e| AttemptError::transient(format!("the response is no JSON: {e}")))?;
        let scores: Option<Vec<f64>> =
            answer["scores"].as_array().and_then(|all| all.iter().map(Value::as_f64).collect());
        match scores {
            Some(scores) if scores.len() == samples.len() => Ok(scores),
            Some(scores) => Err(unusable(format!("it has {} scores for {} samples", scores.len(), samples.len()))),
            None => Err(unusable("it has no list of numbers in `scores`".into())),
        }
    }
}

impl Reward for HttpScorer {
    fn name(&self) -> &str {
        &self.client.endpoint.url
    }

    fn timeout(&self) -> Option<Duration> {
        self.client.timeout()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let parts: Vec<&[Sample]> = samples.chunks(self.batch).collect();
        let row = samples.first().map_or(0, |s| s.row);
        let scores = self.client.map_concurrently(&parts, |part| self.client.with_retries(|| self.send(part)));
        Ok(scores.map_err(|e| e.into_reward_error(self.name(), row))?.into_iter().flatten().map(Judged::from).collect())
    }
}
