//! A program's own scorer: one sample at a time, async, with a deadline, attempts, and a rule for what fails.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt, stream};
use rehearsal_actors::{Judged, Reward, RewardError, Sample};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::futures::BoxFuture;
use crate::metrics::Meters;
use crate::metrics::table::sources;

/// A score of one sample, or why there is none.
pub type Scored = std::result::Result<Judged, String>;

/// A program's own source of scores, asked for one sample at a time.
///
/// It need not be deterministic: each sample's outcome is logged durably before it is used, and a resumed job takes it
/// from the log. [`ScorerFn`] makes one of a closure.
pub trait Scorer: Send + Sync + 'static {
    /// Its name in logs, errors and the ledger.
    fn name(&self) -> &str;

    /// Scores a completion: a finite number, higher is better, with a reason if there is one.
    ///
    /// The future is dropped when the deadline passes or the job is asked to stop. An error, or a panic, is one failed
    /// attempt.
    fn score(&self, sample: Sample) -> BoxFuture<'_, Scored>;
}

/// What becomes of samples that take long or fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScorerPolicy {
    /// Longest time of one attempt; above 0.
    pub deadline: Duration,
    /// Attempts at a sample, at least 1. Pauses between them double, from a quarter of a second to half a minute.
    pub attempts: u32,
    /// What happens after the last attempt.
    pub on_failure: OnFailure,
    /// Samples that are scored at a time, at least 1. A stop or a kill loses the outcomes of at most as many.
    pub concurrency: usize,
}

impl Default for ScorerPolicy {
    /// A minute, three attempts, then the job fails; eight samples at a time.
    fn default() -> Self {
        Self { deadline: Duration::from_secs(60), attempts: 3, on_failure: OnFailure::Fail, concurrency: 8 }
    }
}

/// What happens to a sample that has no score after its last attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// The job ends with an error that names the row. Resumed, it tries the sample again.
    #[default]
    Fail,
    /// The completion is left out of its group, which is logged, told as [`Event::SampleSkipped`](crate::Event) and
    /// counted by the metric `skipped`. A prompt with fewer than two scored completions gives no pair and no advantage.
    Skip,
}

/// A scorer of an async closure.
pub struct ScorerFn<F> {
    name: String,
    f: F,
}

impl<F> ScorerFn<F> {
    /// A scorer of a name and an async closure, which returns a number or a [`Judged`], or an error to show.
    ///
    /// ```
    /// use rehearsal::{Sample, ScorerFn};
    ///
    /// let brief = ScorerFn::new("brief", |sample: Sample| async move {
    ///     // Such as a request to a service.
    ///     Ok::<_, String>(-(sample.tokens as f64))
    /// });
    /// ```
    pub fn new<Fut, J, E>(name: impl Into<String>, f: F) -> Self
    where
        F: Fn(Sample) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = std::result::Result<J, E>> + Send + 'static,
        J: Into<Judged>,
        E: std::fmt::Display,
    {
        Self { name: name.into(), f }
    }
}

impl<F, Fut, J, E> Scorer for ScorerFn<F>
where
    F: Fn(Sample) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = std::result::Result<J, E>> + Send + 'static,
    J: Into<Judged>,
    E: std::fmt::Display,
{
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, sample: Sample) -> BoxFuture<'_, Scored> {
        let scored = (self.f)(sample);
        Box::pin(async move { scored.await.map(Into::into).map_err(|e| e.to_string()) })
    }
}

/// A scorer of a closure that blocks.
pub struct BlockingScorerFn<F> {
    name: String,
    f: Arc<F>,
}

impl<F> BlockingScorerFn<F> {
    /// A scorer of a name and a closure that blocks; each call has a thread of its own. A call that is late, or under way
    /// when the job stops, is left to end by itself, and its result is dropped.
    ///
    /// ```
    /// use rehearsal::{BlockingScorerFn, Sample};
    ///
    /// let words = BlockingScorerFn::new("words", |sample: &Sample| {
    ///     Ok::<_, String>(sample.completion.split_whitespace().count() as f64)
    /// });
    /// ```
    pub fn new<J, E>(name: impl Into<String>, f: F) -> Self
    where
        F: Fn(&Sample) -> std::result::Result<J, E> + Send + Sync + 'static,
        J: Into<Judged>,
        E: std::fmt::Display,
    {
        Self { name: name.into(), f: Arc::new(f) }
    }
}

impl<F, J, E> Scorer for BlockingScorerFn<F>
where
    F: Fn(&Sample) -> std::result::Result<J, E> + Send + Sync + 'static,
    J: Into<Judged>,
    E: std::fmt::Display,
{
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, sample: Sample) -> BoxFuture<'_, Scored> {
        let (f, name) = (self.f.clone(), format!("rehearsal-{}", self.name));
        Box::pin(async move {
            let (sender, receiver) = oneshot::channel();
            // A thread of its own: a runtime that is dropped waits for its threads for blocking work.
            let call = move || {
                let scored = catch_unwind(AssertUnwindSafe(|| f(&sample).map(Into::into).map_err(|e| e.to_string())));
                let _ = sender.send(scored); // nobody waits any more if it is late
            };
            std::thread::Builder::new().name(name).spawn(call).map_err(|e| format!("no thread: {e}"))?;
            match receiver.await {
                Ok(Ok(scored)) => scored,
                Ok(Err(panic)) => resume_unwind(panic),
                Err(_) => Err("its thread ended without a score".into()),
            }
        })
    }
}

/// Pause before the second attempt.
const PAUSE: Duration = Duration::from_millis(250);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A program's scorer under its policy, as the reward of a job.
pub struct HostReward {
    scorer: Arc<dyn Scorer>,
    policy: ScorerPolicy,
    stop: CancellationToken,
    runtime: Handle,
    meters: Arc<Meters>,
}

impl HostReward {
    /// Must be called within the tokio runtime that the scorer's futures need. `stop` is cancelled when the job is asked
    /// to stop.
    pub(crate) fn new(
        scorer: Arc<dyn Scorer>,
        policy: ScorerPolicy,
        stop: CancellationToken,
        meters: Arc<Meters>,
    ) -> Self {
        Self { scorer, policy, stop, runtime: Handle::current(), meters }
    }

    /// One sample, through all its attempts.
    async fn one(&self, sample: &Sample) -> std::result::Result<Judged, RewardError> {
        let (mut reason, mut pause) = (String::new(), PAUSE);
        let attempts = self.policy.attempts.max(1);
        for attempt in 1..=attempts {
            if attempt > 1 {
                self.meters.count(sources::SCORER_RETRIES, "", 1);
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(PAUSE_MAX);
            }
            reason = match self.attempt(sample).await {
                Ok(judged) => return Ok(judged),
                Err(reason) => reason,
            };
        }
        match self.policy.on_failure {
            OnFailure::Skip => Ok(Judged::skipped(reason)),
            OnFailure::Fail => {
                let name = self.scorer.name().to_string();
                let reason = format!("{reason} (attempt {attempts} of {attempts})");
                Err(RewardError::Failed { name, row: sample.row, reason })
            }
        }
    }

    async fn attempt(&self, sample: &Sample) -> Scored {
        // The call itself may panic, before there is a future.
        let scored = AssertUnwindSafe(async { self.scorer.score(sample.clone()).await }).catch_unwind();
        let in_time = tokio::time::timeout(self.policy.deadline, scored).await;
        let late = in_time.is_err();
        let outcome = match in_time {
            Err(_) => Err(format!("no score within {:?}", self.policy.deadline)),
            Ok(Err(panic)) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                Err(format!("panicked: {}", text.unwrap_or("no message")))
            }
            Ok(Ok(Ok(judged))) if !judged.score.is_finite() => {
                Err(format!("the score is {}; it must be a finite number", judged.score))
            }
            Ok(Ok(scored)) => scored,
        };
        let result = match &outcome {
            Ok(_) => "scored",
            Err(_) if late => "late",
            Err(_) => "failed",
        };
        self.meters.count(sources::SCORER_ATTEMPTS, result, 1);
        outcome
    }
}

impl Reward for HostReward {
    fn name(&self) -> &str {
        self.scorer.name()
    }

    fn timeout(&self) -> Option<Duration> {
        // Each sample has its own deadlines.
        Some(crate::judge::LONGEST_WAIT)
    }

    fn batch(&self) -> Option<usize> {
        Some(self.policy.concurrency.max(1))
    }

    /// On the role's own thread, which drives the futures on the program's runtime.
    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        let all = async {
            let scores = stream::iter(samples).map(|sample| self.one(sample)).buffered(self.policy.concurrency.max(1));
            scores.collect::<Vec<_>>().await.into_iter().collect()
        };
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => Err(RewardError::Stopped { name: self.name().into() }),
                scores = all => scores,
            }
        })
    }
}

/// What a program brings in place of rules.
#[derive(Clone)]
pub enum HostScores {
    Reward(Arc<dyn Reward>),
    Scorer(Arc<dyn Scorer>, ScorerPolicy),
}

impl HostScores {
    /// The reward of a job that is asked to stop by `stop`. Must be called within a tokio runtime.
    pub(crate) fn reward(self, stop: CancellationToken, meters: Arc<Meters>) -> Arc<dyn Reward> {
        match self {
            Self::Reward(reward) => reward,
            Self::Scorer(scorer, policy) => Arc::new(HostReward::new(scorer, policy, stop, meters)),
        }
    }
}
