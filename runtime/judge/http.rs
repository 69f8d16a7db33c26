//! Requests to servers: bounded in time and number, tried again with growing pauses.

use std::future::Future;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// How to speak to a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    pub url: String,
    /// Environment variable with a bearer token. Neither is ever logged or stored.
    pub token_env: Option<String>,
    pub timeout: Duration,
    /// Times a request that failed is tried again.
    pub retries: u32,
    /// Keep trying for ever, with pauses of up to a minute.
    pub wait: bool,
    /// Requests under way at a time.
    pub concurrency: usize,
}

/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Pause before the first new try.
const PAUSE: Duration = Duration::from_millis(250);

/// A time that no job sees the end of.
pub const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum PostError {
    Failed(String),
    /// The job was asked to stop.
    Stopped,
}

impl PostError {
    /// As the error of a reward.
    pub fn of(self, name: &str, row: u64) -> RewardError {
        match self {
            Self::Failed(reason) => RewardError::Failed { name: name.into(), row, reason },
            Self::Stopped => RewardError::Stopped { name: name.into() },
        }
    }
}

/// Why one try came to nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{reason}")]
pub(super) struct Failure {
    reason: String,
    /// What the server asks to wait.
    pause: Option<Duration>,
    /// Trying again would change nothing.
    last: bool,
}

impl Failure {
    /// Another try may fare better.
    pub fn again(reason: String) -> Self {
        Self { reason, pause: None, last: false }
    }

    /// No other try will.
    pub fn last(reason: String) -> Self {
        Self { reason, pause: None, last: true }
    }

    /// What a status that is no success means: 408, 429 and 5xx pass.
    pub async fn of(response: reqwest::Response) -> Self {
        let status = response.status().as_u16();
        let pause = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok());
        if matches!(status, 408 | 429 | 500..=599) {
            return Self { pause: pause.map(Duration::from_secs), ..Self::again(format!("it answered {status}")) };
        }
        let text = response.text().await.unwrap_or_default();
        let text: String = text.chars().take(200).collect();
        Self::last(format!("it answered {status}: {text}"))
    }
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        // Its sources say more than it does: a refused connection, a name that is not known.
        let mut reason = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        Self::again(reason)
    }
}

/// Asks a server, from threads that may wait.
pub(super) struct Caller {
    pub endpoint: Endpoint,
    pub client: reqwest::Client,
    /// Taken when it is dropped: a runtime must not be waited for on another's threads.
    runtime: Option<Runtime>,
    stop: CancellationToken,
}

impl Caller {
    /// Pauses between tries, and requests under way, end with `stop`.
    pub fn new(endpoint: Endpoint, stop: CancellationToken) -> Result<Self, String> {
        let client = reqwest::Client::builder().timeout(endpoint.timeout).build().map_err(|e| e.to_string())?;
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).thread_name("rehearsal-http").enable_all().build();
        Ok(Self { endpoint, client, runtime: Some(runtime.map_err(|e| e.to_string())?), stop })
    }

    /// For ever, if it waits for its server for ever.
    pub fn patience(&self) -> Option<Duration> {
        self.endpoint.wait.then_some(FOREVER)
    }

    /// The bearer token, if there is one.
    pub fn token(&self) -> Result<Option<String>, Failure> {
        let Some(name) = &self.endpoint.token_env else { return Ok(None) };
        let token = std::env::var(name).map_err(|_| Failure::last(format!("the environment has no {name}")))?;
        match reqwest::header::HeaderValue::from_str(&token) {
            Ok(_) => Ok(Some(token)),
            Err(_) => Err(Failure::last(format!("the value of {name} in the environment cannot be a token"))),
        }
    }

    /// Tries until `once` gives an answer, or a failure that will not pass, or the tries are used up.
    pub fn ask<T, F>(&self, once: impl Fn() -> F) -> Result<T, PostError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let Some(runtime) = &self.runtime else { return Err(PostError::Stopped) };
        let Endpoint { url, retries, wait, .. } = &self.endpoint;
        runtime.block_on(async {
            let mut tried = 0;
            loop {
                let answer = tokio::select! {
                    answer = once() => answer,
                    () = self.stop.cancelled() => return Err(PostError::Stopped),
                };
                let Failure { reason, pause, last } = match answer {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => failure,
                };
                if last || (tried >= *retries && !wait) {
                    return Err(PostError::Failed(format!("{url}: {reason}, after {} tries", tried + 1)));
                }
                tracing::warn!(url, reason, tried, "a request failed and is tried again");
                let pause = pause.unwrap_or(PAUSE * 2u32.saturating_pow(tried.min(16))).min(PAUSE_MAX);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.stop.cancelled() => return Err(PostError::Stopped),
                }
                tried += 1;
            }
        })
    }

    /// Runs `one` on every item, some at a time; the first failure ends it.
    pub fn all<I: Sync, T: Send>(
        &self,
        items: &[I],
        one: impl Fn(&I) -> Result<T, PostError> + Sync,
    ) -> Result<Vec<T>, PostError> {
        let next = AtomicUsize::new(0);
        let done: Mutex<Vec<Option<Result<T, PostError>>>> = Mutex::new(items.iter().map(|_| None).collect());
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
                None => continue, // another failed, and its error comes
            }
        }
        if all.len() == items.len() { Ok(all) } else { Err(PostError::Failed("a request was not made".into())) }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A server that scores completions: it is sent `{"samples": [{"prompt", "completion", "answer"}]}` and answers
/// `{"scores": [..]}`.
pub struct HttpScorer {
    caller: Caller,
    /// Samples of one request.
    batch: usize,
}

impl HttpScorer {
    /// A server, asked about so many samples at a time, until the job is to stop.
    pub fn new(endpoint: Endpoint, batch: usize, stop: CancellationToken) -> Result<Self, String> {
        Ok(Self { caller: Caller::new(endpoint, stop)?, batch: batch.max(1) })
    }

    async fn post(&self, samples: &[Sample]) -> Result<Vec<f64>, Failure> {
        let row = |s: &Sample| json!({"prompt": s.prompt, "completion": s.completion, "answer": s.answer});
        let body = json!({"samples": samples.iter().map(row).collect::<Vec<_>>()});
        let mut request = self.caller.client.post(&self.caller.endpoint.url).json(&body);
        if let Some(token) = self.caller.token()? {
            request = request.bearer_auth(token);
        }
        let response = request.send().await?;
        if !response.status().is_success() {
            return Err(Failure::of(response).await);
        }
        let refused = |reason: String| Failure::again(format!("its answer cannot be used: {reason}"));
        let answer: Value = response.json().await.map_err(|e| Failure::again(format!("its answer is no JSON: {e}")))?;
        let scores: Option<Vec<f64>> =
            answer["scores"].as_array().and_then(|all| all.iter().map(Value::as_f64).collect());
        match scores {
            Some(scores) if scores.len() == samples.len() => Ok(scores),
            Some(scores) => Err(refused(format!("{} scores for {} samples", scores.len(), samples.len()))),
            None => Err(refused("no list of numbers in `scores`".into())),
        }
    }
}

impl Reward for HttpScorer {
    fn name(&self) -> &str {
        &self.caller.endpoint.url
    }

    fn timeout(&self) -> Option<Duration> {
        self.caller.patience()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let parts: Vec<&[Sample]> = samples.chunks(self.batch).collect();
        let row = samples.first().map_or(0, |s| s.row);
        let scores = self.caller.all(&parts, |part| self.caller.ask(|| self.post(part)));
        Ok(scores.map_err(|e| e.of(self.name(), row))?.into_iter().flatten().map(Judged::from).collect())
    }
}
