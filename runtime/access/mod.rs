//! The one way to read a job: by its process while it runs, through a Unix socket in its directory, and from its store
//! while it does not.

mod live;
mod overrule;
mod records;
mod request;
#[cfg(unix)]
mod socket;
mod stored;
mod tokens;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rehearsal_lm::Checkpoint;
use rehearsal_store::{CheckpointSummary, Error as StoreError, Preference, Query, Repair, Store};

pub(crate) use live::Live;
pub use overrule::Overrule;
pub(crate) use request::Request;
pub use request::{Brief, Control, Generate, Generated, Rollouts, Verified, WeightType};
#[cfg(unix)]
pub(crate) use socket::{Server, serve};
pub use stored::complete;
pub use tokens::{Score, ScoredToken, ScoredTokens};

use self::request::Reply;
use crate::blocking::blocking;
use crate::error::{At, Error, Result};
use crate::status::JobStatus;

/// Asks, and takes the reply that belongs to the request.
macro_rules! expect {
    ($reader:ident, $request:expr, $reply:pat => $value:expr) => {
        match $reader.ask($request).await? {
            $reply => Ok($value),
            other => Err(Error::Internal(format!("the reply to another request arrived: {other:?}"))),
        }
    };
}

/// How far a job is, and whether a process that answers runs it. The store is not opened.
///
/// # Errors
///
/// Errors of reading the status.
pub async fn glance(directory: &Path) -> Result<(JobStatus, bool)> {
    #[cfg(unix)]
    if socket::connect(directory).await?.is_some() {
        let running = JobReader { directory: directory.into(), source: Source::Running };
        // Without an answer it has ended meanwhile.
        if let Ok(Reply::Status(status)) = running.ask_once(Request::Status).await {
            return Ok((*status, true));
        }
    }
    let directory = directory.to_path_buf();
    Ok((blocking(move || stored::status(&directory)).await?, false))
}

/// The directories of jobs in a directory: itself, its folders, and theirs, such as those of a chain's stages; by name.
///
/// # Errors
///
/// If the directory cannot be read.
pub fn jobs_in(directory: &Path) -> Result<Vec<PathBuf>> {
    if Store::exists(directory) {
        return Ok(vec![directory.into()]);
    }
    let mut jobs = Vec::new();
    for entry in std::fs::read_dir(directory).at(directory)? {
        let path = entry.at(directory)?.path();
        if Store::exists(&path) {
            jobs.push(path);
        } else if path.is_dir() {
            let inner = std::fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path());
            jobs.extend(inner.filter(|path| Store::exists(path)));
        }
    }
    jobs.sort();
    Ok(jobs)
}

/// How long opening waits for a process that holds the store and does not listen: it is starting, or ending.
const PATIENCE: Duration = Duration::from_secs(3);

/// Reads a job, whether or not a process runs it.
///
/// While the job runs, its process answers: [`JobReader::generate`] uses the weights of this moment. While it does not,
/// its store answers: the weights are those of the newest intact checkpoint, and the directory is locked, so that the job
/// cannot be resumed before the reader is dropped.
///
/// ```no_run
/// # async fn f() -> rehearsal::Result<()> {
/// use rehearsal::{Generate, JobReader};
///
/// let job = JobReader::open("runs/quickstart").await?;
/// let status = job.status().await?;
/// println!("step {} of {}", status.step, status.steps);
/// println!("{}", job.generate(Generate::new("What does the fox do?")).await?.text);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct JobReader {
    directory: PathBuf,
    source: Source,
}

#[derive(Clone)]
enum Source {
    /// A handle to the job, in this process.
    Here(Box<Live>),
    /// The job's socket.
    #[cfg(unix)]
    Running,
    Stored {
        store: Arc<Mutex<Store>>,
        repairs: Vec<Repair>,
    },
    /// A process holds the store and does not listen: it is starting, or its file system has no sockets.
    Silent {
        owner: String,
    },
}

impl JobReader {
    /// A reader of a job that this process runs.
    pub(crate) fn live(directory: &Path, live: Live) -> Self {
        Self { directory: directory.into(), source: Source::Here(Box::new(live)) }
    }

    /// Opens a job by its directory.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToResume`] if the directory holds no job, and the errors of the store. Of a process that holds the
    /// job and does not answer, such as one that is starting, only the status can be read.
    pub async fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory: PathBuf = directory.as_ref().into();
        let deadline = Instant::now() + PATIENCE;
        loop {
            #[cfg(unix)]
            if socket::connect(&directory).await?.is_some() {
                return Ok(Self { directory, source: Source::Running });
            }
            let path = directory.clone();
            let opened = blocking(move || {
                // Checked before opening, which would create a store.
                if !Store::exists(&path) {
                    return Err(Error::NothingToResume(path));
                }
                Ok(Store::open(&path)?)
            })
            .await;
            match opened {
                Ok((store, repairs)) => {
                    let store = Arc::new(Mutex::new(store));
                    return Ok(Self { directory, source: Source::Stored { store, repairs } });
                }
                Err(Error::Store(StoreError::InUse { .. })) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(Error::Store(StoreError::InUse { owner, .. })) => {
                    return Ok(Self { directory, source: Source::Silent { owner } });
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The job's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a process ran the job when it was opened.
    pub fn is_running(&self) -> bool {
        !matches!(self.source, Source::Stored { .. })
    }

    /// What was repaired when the store was opened.
    pub fn repairs(&self) -> &[Repair] {
        match &self.source {
            Source::Stored { repairs, .. } => repairs,
            _ => &[],
        }
    }

    async fn ask(&self, request: Request) -> Result<Reply> {
        match self.ask_once(request.clone()).await {
            // The process has ended meanwhile, or was killed: another one answers, or the store.
            Err(Error::Ended | Error::Unreachable { .. }) if !matches!(self.source, Source::Here(_)) => {
                Self::open(&self.directory).await?.ask_once(request).await
            }
            other => other,
        }
    }

    async fn ask_once(&self, request: Request) -> Result<Reply> {
        match &self.source {
            Source::Here(live) => live.answer(request).await,
            #[cfg(unix)]
            Source::Running => match socket::connect(&self.directory).await? {
                Some(stream) => socket::ask(stream, &self.directory, &request).await,
                None => Err(Error::Ended),
            },
            Source::Silent { owner } => match request {
                Request::Status => Ok(Reply::Status(Box::new(stored::status(&self.directory)?))),
                _ => {
                    let (directory, owner) = (self.directory.clone(), owner.clone());
                    Err(StoreError::InUse { directory, owner }.into())
                }
            },
            Source::Stored { store, .. } => {
                let store = store.clone();
                blocking(move || {
                    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
                    stored::answer(&mut store, request)
                })
                .await
            }
        }
    }

    /// The model that the job trains: the weights of this moment while it runs, those of the newest intact checkpoint
    /// while it does not. `scratch` names a directory that does not exist; a running job writes its model there, and it is
    /// removed again.
    pub async fn model(&self, scratch: &Path) -> Result<Checkpoint> {
        if let Source::Stored { store, .. } = &self.source {
            let store = store.clone();
            let load = move || Ok(stored::model(&store.lock().unwrap_or_else(PoisonError::into_inner))?.0);
            return blocking(load).await;
        }
        self.export(scratch, WeightType::F32).await?;
        let scratch: PathBuf = scratch.into();
        blocking(move || {
            let model = Checkpoint::open(&scratch);
            let _ = std::fs::remove_dir_all(&scratch); // what stays is the caller's to remove
            Ok(model?)
        })
        .await
    }

    /// How far the job is.
    pub async fn status(&self) -> Result<JobStatus> {
        expect!(self, Request::Status, Reply::Status(status) => *status)
    }

    /// A completion of a prompt by the trained model.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for values out of range, and [`Error::NoPolicy`] if the job trains a reward model.
    pub async fn generate(&self, request: Generate) -> Result<Generated> {
        expect!(self, Request::Generate(request), Reply::Generated(generated) => generated)
    }

    /// Writes the trained model to a Hugging Face directory, and returns the steps it has had. A running job writes
    /// it between two steps. A model in the directory is replaced.
    ///
    /// # Errors
    ///
    /// Errors of writing, and [`Error::NotAModelDirectory`] if the directory holds something else: it is replaced as a whole.
    pub async fn export(&self, directory: impl AsRef<Path>, dtype: WeightType) -> Result<u64> {
        let path = directory.as_ref();
        // The process that runs the job may have another working directory.
        let directory = std::path::absolute(path).map_err(|source| Error::Io { path: path.into(), source })?;
        expect!(self, Request::Export { directory, dtype }, Reply::Exported { step } => step)
    }

    /// The durable checkpoints, oldest first.
    pub async fn checkpoints(&self) -> Result<Vec<CheckpointSummary>> {
        expect!(self, Request::Checkpoints, Reply::Checkpoints(checkpoints) => checkpoints)
    }

    /// The records of the preference ledger that match a query, in the order of steps and indices.
    pub async fn preferences(&self, query: Query) -> Result<Vec<Preference>> {
        let (mut all, mut query): (Vec<Preference>, _) = (Vec::new(), query);
        loop {
            let page = self.preferences_page(query.clone()).await?;
            let Some(last) = page.last() else { return Ok(all) };
            query.after = Some((last.step, last.index));
            all.extend(page);
        }
    }

    /// One page of [`preferences`](Self::preferences): at most 256 records, the first that match. [`Query::after`] asks for the
    /// next page.
    pub async fn preferences_page(&self, query: Query) -> Result<Vec<Preference>> {
        expect!(self, Request::Preferences(query), Reply::Preferences(page) => page)
    }

    /// At most 4,096 records without their texts, the first that match. [`Query::after`] asks for the next ones.
    pub async fn brief_page(&self, query: Query) -> Result<Vec<Brief>> {
        expect!(self, Request::Brief(query), Reply::Brief(page) => page)
    }

    /// Log-probabilities of a completion, token by token, under the trained model and the reference: with the weights of this
    /// moment while the job runs, those of the newest intact checkpoint while it does not.
    ///
    /// # Errors
    ///
    /// [`Error::NoPolicy`] if the job trains a reward model, [`Error::Usage`] for an empty completion.
    pub async fn score(&self, request: Score) -> Result<ScoredTokens> {
        expect!(self, Request::Score(request), Reply::Scored(scored) => scored)
    }

    /// Writes a person's ranking into the ledger, in place of a record's. A second one replaces the first.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if there is no such record, or name or ranks are invalid.
    pub async fn overrule(&self, overrule: Overrule) -> Result<()> {
        expect!(self, Request::Overrule(overrule), Reply::Overruled => ())
    }

    /// Asks a running job to pause, go on, save a checkpoint or stop; returns the step of the checkpoint if one was saved.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if the job does not run.
    pub async fn control(&self, control: Control) -> Result<Option<u64>> {
        expect!(self, Request::Control(control), Reply::Controlled { step } => step)
    }

    /// The logged completions of a step that is under way, with the scores that are known.
    pub async fn rollouts(&self, step: u64) -> Result<Rollouts> {
        expect!(self, Request::Rollouts { step }, Reply::Rollouts(rollouts) => rollouts)
    }

    /// Verifies every checksum. A running job writes nothing meanwhile.
    pub async fn verify(&self) -> Result<Verified> {
        expect!(self, Request::Verify, Reply::Verified(verified) => verified)
    }
}
