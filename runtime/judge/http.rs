//! Requests to servers: bounded in time and number, tried again with growing pauses.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use serde_json::{Value, json};
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

/// A pause looks this often whether the job is to stop.
const LOOK: Duration = Duration::from_millis(50);

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

impl Endpoint {
    /// Sends a JSON body and reads a JSON answer that `read` understands; tries again on timeouts, lost connections, 408,
    /// 429, 5xx, and answers that `read` refuses.
    /// An end of the job is waited for no longer than the request under way.
    pub fn post<T>(
        &self,
        body: &Value,
        stop: &CancellationToken,
        read: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T, PostError> {
        let agent: ureq::Agent =
            ureq::Agent::config_builder().timeout_global(Some(self.timeout)).http_status_as_error(false).build().into();
        let mut tried = 0;
        loop {
            let (reason, pause, final_) = match self.once(&agent, body) {
                Ok(value) => match read(&value) {
                    Ok(read) => return Ok(read),
                    Err(reason) => (format!("its answer cannot be used: {reason}"), None, false),
                },
                Err(failure) => (failure.reason, failure.pause, failure.final_),
            };
            if final_ || (tried >= self.retries && !self.wait) {
                return Err(PostError::Failed(format!("{}: {reason}, after {} tries", self.url, tried + 1)));
            }
            tracing::warn!(url = self.url, reason, tried, "a request failed and is tried again");
            let until = Instant::now() + pause.unwrap_or(PAUSE * 2u32.saturating_pow(tried.min(16))).min(PAUSE_MAX);
            while Instant::now() < until && !stop.is_cancelled() {
                std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
            }
            if stop.is_cancelled() {
                return Err(PostError::Stopped);
            }
            tried += 1;
        }
    }

    /// For ever, if it waits for its server for ever.
    pub fn patience(&self) -> Option<Duration> {
        self.wait.then_some(FOREVER)
    }

    fn once(&self, agent: &ureq::Agent, body: &Value) -> Result<Value, Failure> {
        let mut request = agent.post(&self.url);
        if let Some(name) = &self.token_env {
            let token = std::env::var(name).map_err(|_| Failure::last(format!("the environment has no {name}")))?;
            request = request.header("Authorization", &format!("Bearer {token}"));
        }
        let mut response = request.send_json(body).map_err(|e| Failure::again(e.to_string()))?;
        let status = response.status().as_u16();
        let pause =
            response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.parse().ok()).map(Duration::from_secs);
        match status {
            200..=299 => {
                response.body_mut().read_json().map_err(|e| Failure::again(format!("its answer is no JSON: {e}")))
            }
            408 | 429 | 500..=599 => Err(Failure { pause, ..Failure::again(format!("it answered {status}")) }),
            _ => {
                let text = response.body_mut().read_to_string().unwrap_or_default();
                let text: String = text.chars().take(200).collect();
                Err(Failure::last(format!("it answered {status}: {text}")))
            }
        }
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
            for _ in 0..self.concurrency.clamp(1, items.len().max(1)) {
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

struct Failure {
    reason: String,
    pause: Option<Duration>,
    /// Trying again would change nothing.
    final_: bool,
}

impl Failure {
    fn again(reason: String) -> Self {
        Self { reason, pause: None, final_: false }
    }

    fn last(reason: String) -> Self {
        Self { reason, pause: None, final_: true }
    }
}

/// A server that scores completions: it is sent `{"samples": [{"prompt", "completion", "answer"}]}` and answers
/// `{"scores": [..]}`.
pub struct HttpScorer {
    endpoint: Endpoint,
    /// Samples of one request.
    batch: usize,
    stop: CancellationToken,
}

impl HttpScorer {
    /// A server, asked about so many samples at a time, until the job is to stop.
    pub fn new(endpoint: Endpoint, batch: usize, stop: CancellationToken) -> Self {
        Self { endpoint, batch: batch.max(1), stop }
    }
}

impl Reward for HttpScorer {
    fn name(&self) -> &str {
        &self.endpoint.url
    }

    fn patience(&self) -> Option<Duration> {
        self.endpoint.patience()
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let parts: Vec<&[Sample]> = samples.chunks(self.batch).collect();
        let ask = |part: &&[Sample]| {
            let rows: Vec<Value> = part
                .iter()
                .map(|s| json!({"prompt": s.prompt, "completion": s.completion, "answer": s.answer}))
                .collect();
            self.endpoint.post(&json!({"samples": rows}), &self.stop, |value| {
                let scores: Option<Vec<f64>> =
                    value["scores"].as_array().and_then(|all| all.iter().map(Value::as_f64).collect());
                match scores {
                    Some(scores) if scores.len() == part.len() => Ok(scores),
                    Some(scores) => Err(format!("{} scores for {} samples", scores.len(), part.len())),
                    None => Err("no list of numbers in `scores`".into()),
                }
            })
        };
        let row = samples.first().map_or(0, |s| s.row);
        Ok(self
            .endpoint
            .all(&parts, ask)
            .map_err(|e| e.of(&self.endpoint.url, row))?
            .into_iter()
            .flatten()
            .map(Judged::from)
            .collect())
    }
}
