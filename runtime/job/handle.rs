//! The handle to a running job.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{broadcast, watch};

use crate::access::{Generate, Generated, JobReader, Live, WeightType};
use crate::error::{Error, Result};
use crate::events::{Event, Outcome};
use crate::status::JobStatus;

/// How a job ended; `None` while it runs.
pub type Ended = Option<std::result::Result<Outcome, Arc<Error>>>;

/// A running job. Clones are handles to the same job; it goes on when all of them are dropped.
///
/// ```no_run
/// # async fn f() -> Result<(), Box<dyn std::error::Error>> {
/// use rehearsal::rewards::RuleSource;
/// use rehearsal::{Config, Event, Generate, Job};
///
/// let mut config = Config::new("runs/brief");
/// config.reward::<RuleSource>().unwrap().rules = vec!["length_window".into()];
/// let job = Job::builder(config).start().await?;
/// let mut events = job.events();
/// while let Ok(event) = events.recv().await {
///     match event {
///         Event::Step(step) if step.step == 10 => {
///             println!("{}", job.generate(Generate::new("What does the fox do?")).await?.text);
///             job.stop();
///         }
///         Event::Finished(_) | Event::Failed { .. } => break,
///         _ => {}
///     }
/// }
/// let outcome = job.wait().await?;
/// println!("stopped after step {}", outcome.step);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct JobHandle {
    pub(super) directory: Arc<PathBuf>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) live: Live,
    pub(super) ended: watch::Receiver<Ended>,
}

impl JobHandle {
    /// The job's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What happens, as it happens, from the moment of this call. A subscriber that falls behind by 4,096 events misses the
    /// oldest.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// How far the job is. [`JobHandle::status_changes`] waits for changes.
    pub fn status(&self) -> JobStatus {
        self.live.status.borrow().clone()
    }

    /// The status as a channel that holds the newest.
    pub fn status_changes(&self) -> watch::Receiver<JobStatus> {
        self.live.status.clone()
    }

    /// Lets the job wait before its next step until [`JobHandle::unpause`]. The step under way is finished;
    /// [`Event::Paused`] says when the job waits. A paused job still answers, saves and stops.
    pub fn pause(&self) {
        self.live.pause.send_replace(true);
    }

    /// Lets a paused job go on.
    pub fn unpause(&self) {
        self.live.pause.send_replace(false);
    }

    /// Asks the job to end with a checkpoint: [`JobHandle::wait`] returns an outcome that is `stopped`. A step under way is
    /// given up, and taken again by the job that resumes; its completions are logged and not generated again.
    pub fn stop(&self) {
        self.live.cancel.cancel();
    }

    /// Waits for the end of the job, and returns how it ended, to every caller.
    ///
    /// # Errors
    ///
    /// What ended the job, shared between all who wait.
    pub async fn wait(&self) -> std::result::Result<Outcome, Arc<Error>> {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        ended.unwrap_or_else(|| Err(Arc::new(Error::Internal("the job's task ended without an outcome".into()))))
    }

    /// Whether the job has ended.
    pub fn is_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Saves a checkpoint after the step under way, unless there is one of that step, and returns the step.
    ///
    /// # Errors
    ///
    /// [`Error::Ended`] once the job has ended.
    pub async fn checkpoint(&self) -> Result<u64> {
        self.live.checkpoint().await
    }

    /// A completion of a prompt by the weights of this moment. It waits for its turn at the policy, and changes no result of
    /// the job.
    ///
    /// # Errors
    ///
    /// As [`JobReader::generate`].
    pub async fn generate(&self, request: Generate) -> Result<Generated> {
        self.reader().generate(request).await
    }

    /// Writes the model as it is after the step under way to a Hugging Face directory, and returns the step.
    ///
    /// # Errors
    ///
    /// As [`JobReader::export`].
    pub async fn snapshot(&self, directory: impl AsRef<Path>, dtype: WeightType) -> Result<u64> {
        self.reader().export(directory, dtype).await
    }

    /// A reader of the job's status, checkpoints, rollouts and preference ledger while it runs. After its end,
    /// [`JobReader::open`] reads the directory.
    pub fn reader(&self) -> JobReader {
        JobReader::live(&self.directory, self.live.clone())
    }
}
