//! A job from the outside: build it, watch it, run or resume it, stop it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rehearsal_actors::{Devices, Director, DirectorEvent, Reward};
use rehearsal_store::{Repair, Store};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use super::config::Config;
use super::fingerprint::Fingerprint;
use super::handle::JobHandle;
use super::metrics::{HostRecorder, JobMetrics, MetricsAddress};
use super::origin::Origin;
use super::saved::Kept;
use super::view::{Served, ViewAddress};
use crate::access::{self, JobReader, Live};
use crate::algorithms::Algorithms;
use crate::blocking::blocking;
use crate::driver::{Algorithm, Loaded, LoadedAlgorithm, Loader, Roles, Run, Setup, drive, start, watch_waits};
use crate::error::{Error, Result};
use crate::events::{Event, Outcome};
use crate::heap;
use crate::metrics::Meters;
use crate::metrics::table::{counters, process};
use crate::readiness::Readiness;
use crate::rewards::{HostScores, Scorer, ScorerPolicy};
use crate::status::JobStatus;

/// Events kept for a subscriber that falls behind; it then misses the oldest.
const EVENTS_KEPT: usize = 4096;

/// Puts a job together.
pub struct JobBuilder {
    config: Config,
    kept: Option<Kept>,
    reward: Option<HostScores>,
    recorder: Option<HostRecorder>,
    name: Option<String>,
    devices: Option<Devices>,
    /// The folder of the chain that the job is a stage of, and the chain's document.
    chain: Option<(PathBuf, Kept)>,
    events: broadcast::Sender<Event>,
}

impl JobBuilder {
    /// What happens, as it happens, from before the job starts.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// A name that tells the job from others of the process: the value of a label `job` on every metric, and of `name` on
    /// the span of its log. Without one there is no label, and the span has the directory alone.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Devices that the job shares with others, in place of its own. Jobs that share them compute in turns, on the CPU
    /// threads of [`Devices::new`]; `placement.threads` is not used. Results do not depend on it.
    pub fn devices(mut self, devices: Devices) -> Self {
        self.devices = Some(devices);
        self
    }

    /// The reward, in place of the configuration's rules, called with many samples at a time. An error ends the job, and a
    /// panic restarts the reward; [`JobBuilder::scorer`] has other ways.
    pub fn reward(mut self, reward: impl Reward) -> Self {
        self.reward = Some(HostScores::Reward(Arc::new(reward)));
        self
    }

    /// The program's own scorer, in place of the configuration's rules, with a policy for samples that take long or fail.
    ///
    /// # Example
    ///
    /// ```
    /// use rehearsal::{Config, Job, OnFailure, Sample, ScorerFn, ScorerPolicy};
    ///
    /// let scorer = ScorerFn::new("brief", |s: Sample| async move { Ok::<_, String>(-(s.tokens as f64)) });
    /// let policy = ScorerPolicy { on_failure: OnFailure::Skip, ..ScorerPolicy::default() };
    /// let job = Job::builder(Config::new("runs/brief")).scorer(scorer, policy);
    /// ```
    pub fn scorer(mut self, scorer: impl Scorer, policy: ScorerPolicy) -> Self {
        self.reward = Some(HostScores::Scorer(Arc::new(scorer), policy));
        self
    }

    /// Where metrics go; nothing is installed globally. Without it they go to `metrics.listen`, or nowhere.
    pub fn recorder(mut self, recorder: HostRecorder) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// The chain that the job is a stage of: its folder, and its document, which is kept there once the stage has accepted
    /// its settings.
    pub(super) fn chain(mut self, folder: PathBuf, document: Kept) -> Self {
        self.chain = Some((folder, document));
        self
    }

    /// The text of the configuration, kept with the job so that `rehearsal resume DIR` finds it; its paths are relative to
    /// the current directory. Without it, the configuration is written out.
    pub fn source(self, toml: impl Into<String>) -> Self {
        self.kept(Kept::new(toml, here(), None))
    }

    /// As [`JobBuilder::source`], with where the text came from.
    pub(super) fn kept(mut self, kept: Kept) -> Self {
        self.kept = Some(kept);
        self
    }

    /// Starts the job in a new directory, on the current tokio runtime, and returns its handle once its roles are up.
    ///
    /// # Errors
    ///
    /// Those of [`JobBuilder::build`], [`Error::Exists`] if the directory holds a job, and whatever keeps the job from
    /// starting: models, data, devices, ports. Nothing is written before models and data are read.
    pub async fn start(self) -> Result<JobHandle> {
        self.build()?.start(Begin::New).await
    }

    /// Continues an interrupted job as [`JobBuilder::start`] starts one: the result is that of a job that was not
    /// interrupted.
    ///
    /// # Errors
    ///
    /// As [`Job::resume`].
    pub async fn resume(self) -> Result<JobHandle> {
        self.build()?.start(Begin::Again).await
    }

    /// Starts the job, or continues it if its directory holds one.
    ///
    /// # Errors
    ///
    /// As [`JobBuilder::start`] and [`JobBuilder::resume`].
    pub async fn start_or_resume(self) -> Result<JobHandle> {
        self.build()?.start(Begin::Either).await
    }

    /// The job, not yet started. Files and models that the configuration names must exist: of several stages, build each
    /// once those before it are done, as [`Chain`](crate::Chain) does.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] with all problems of the configuration, and [`Error::NoReward`] if the algorithm needs a reward and
    /// there is none.
    pub fn build(self) -> Result<Job> {
        let JobBuilder { config, kept, reward, recorder, name, devices, chain, events } = self;
        config.check()?;
        let configured = config.rewards.iter().any(|source| source.is_configured());
        if config.algorithm.needs_reward() && !configured && reward.is_none() {
            return Err(Error::NoReward);
        }
        let kept = kept.unwrap_or_else(|| Kept::new(config.to_toml(), here(), None));
        Ok(Job { config, kept, reward, recorder, name, devices, chain, events })
    }
}

/// A job that can be run or resumed.
pub struct Job {
    pub(super) config: Config,
    pub(super) kept: Kept,
    /// The host's reward, which takes the place of rules.
    pub(super) reward: Option<HostScores>,
    pub(super) recorder: Option<HostRecorder>,
    name: Option<String>,
    pub(super) devices: Option<Devices>,
    chain: Option<(PathBuf, Kept)>,
    events: broadcast::Sender<Event>,
}

/// Whether a job begins in a new directory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    New,
    Again,
    /// New if the directory holds no job.
    Either,
}

/// What a job has read, and its open store.
struct Opened {
    algorithm: Box<dyn LoadedAlgorithm>,
    loaded: Loaded,
    /// Version of the arithmetic that the job was begun with.
    results: u32,
    store: Store,
    repairs: Vec<Repair>,
}

/// A job whose roles are up. What is dropped with it stops.
struct Running {
    run: Run,
    algorithm: Box<dyn Algorithm>,
    /// Tasks that watch the job; they end with it.
    _watchers: JoinSet<()>,
    _metrics: JobMetrics,
    _view: Option<Served>,
    span: Span,
    #[cfg(unix)]
    socket: Option<access::Server>,
}

impl Job {
    /// Begins to put a job together.
    pub fn builder(config: Config) -> JobBuilder {
        let events = broadcast::channel(EVENTS_KEPT).0;
        let (kept, reward, recorder) = (None, None, None);
        JobBuilder { config, kept, reward, recorder, name: None, devices: None, chain: None, events }
    }

    /// Begins to put the job of a directory together, as it was configured: to be resumed. What the host brought (a
    /// reward, a recorder) it has to bring again.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToResume`] if the directory holds no job, and problems of its configuration. A job of the program's
    /// own algorithm is found by [`Algorithms::saved`].
    pub fn saved(directory: impl AsRef<Path>) -> Result<JobBuilder> {
        let directory = directory.as_ref();
        Ok(Self::builder(Algorithms::default().saved(directory)?).kept(Kept::of(directory)?))
    }

    /// Where everything the job makes is kept.
    pub fn directory(&self) -> &Path {
        &self.config.common.job.directory
    }

    /// What happens, as it happens, from the moment of this call.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Runs the job in a new directory to its end. Cancelling `cancel` saves a checkpoint and ends it.
    /// [`JobBuilder::start`] does the same in the background, with a handle.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if the directory holds a job, and whatever ends the job.
    pub async fn run(self, cancel: CancellationToken) -> Result<Outcome> {
        let (running, _) = self.bring_up(Begin::New, cancel).await?;
        running.drive().await
    }

    /// Continues a job that was interrupted: the result is that of a job that was not.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToResume`] if the directory holds no job, [`Error::Changed`] if the configuration differs in what
    /// changes results, and whatever ends the job.
    pub async fn resume(self, cancel: CancellationToken) -> Result<Outcome> {
        let (running, _) = self.bring_up(Begin::Again, cancel).await?;
        running.drive().await
    }

    /// Starts or resumes the job in the background.
    pub(super) async fn start(self, begin: Begin) -> Result<JobHandle> {
        let (directory, events) = (Arc::new(self.directory().to_path_buf()), self.events.clone());
        let (running, live) = self.bring_up(begin, CancellationToken::new()).await?;
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move { sender.send_replace(Some(running.drive().await.map_err(Arc::new))) });
        Ok(JobHandle { directory, events, live, ended })
    }

    /// Reads models and data, then opens the store. A new job's directory is not written before the input is known to be
    /// good.
    async fn open(&self, begin: Begin) -> Result<Opened> {
        let (config, reward) = (self.config.clone(), self.reward.is_some());
        let (mut kept, chain) = (self.kept.clone(), self.chain.clone());
        blocking(move || {
            let directory = config.common.job.directory.clone();
            let exists = Store::exists(&directory);
            if begin == Begin::Again && !exists {
                return Err(Error::NothingToResume(directory));
            }
            if exists {
                kept = kept.adopting(&directory)?;
            }
            let results = kept.origin.results;
            let (algorithm, loaded) = load(&config, reward, &kept.origin)?;
            let (mut store, repairs) = Store::open(&directory)?;
            // Checkpoints without settings are what is left of a job whose database was lost.
            let begun = Fingerprint::is_in(&store)? || !store.checkpoints()?.is_empty();
            let fingerprint = Fingerprint::new(&config, loaded.fingerprint.clone());
            match begin {
                Begin::New if begun => return Err(Error::Exists(directory)),
                _ if begun || begin == Begin::Again => {
                    fingerprint.check(&mut store, &directory)?;
                    // A change that is allowed, such as more steps, holds for the next resume too.
                    kept.save_again(&directory)?;
                    if let Some((folder, whole)) = chain {
                        whole.save_again(&folder)?;
                    }
                }
                _ => {
                    kept.save(&directory)?;
                    // Last: a job that was killed before this may simply be run again.
                    fingerprint.save(&mut store, &directory)?;
                }
            }
            Ok(Opened { algorithm, loaded, results, store, repairs })
        })
        .await
    }

    /// The span of the job's log.
    fn span(&self) -> Span {
        let directory = self.directory().display();
        match &self.name {
            Some(name) => tracing::info_span!("job", name, %directory),
            None => tracing::info_span!("job", %directory),
        }
    }

    /// Starts the roles.
    async fn bring_up(self, begin: Begin, cancel: CancellationToken) -> Result<(Running, Live)> {
        let span = self.span();
        async move {
            // What can fail does so before anything is written.
            let addresses = self.addresses()?;
            let devices = self.open_devices().await?;
            let opened = self.open(begin).await?;
            self.start_roles(opened, addresses, devices, cancel).await
        }
        .instrument(span)
        .await
    }

    async fn start_roles(
        self,
        opened: Opened,
        (address, view): (MetricsAddress, ViewAddress),
        devices: Devices,
        cancel: CancellationToken,
    ) -> Result<(Running, Live)> {
        let span = self.span();
        let Job { config, reward, recorder, name, events, .. } = self;
        let Opened { algorithm, loaded, results, store, repairs } = opened;
        let mut common = config.common.clone();
        common.job.steps = loaded.steps.unwrap_or(common.job.steps);
        if let Some(message) = slow_build() {
            tracing::warn!("{message}");
            let _ = events.send(Event::SlowBuild { message });
        }
        for repair in repairs {
            let _ = events.send(Event::Repaired { message: repair.0 });
        }
        let readiness = Readiness::default();
        let declared = config.algorithms().metrics();
        let metrics = address.serve(recorder.as_ref(), &declared, name.as_deref(), &readiness)?;
        let meters = metrics.meters.clone();
        let (director_events, restarts) = mpsc::unbounded_channel();
        let director = Director::start(common.limits.restarts_max, common.limits.request, director_events).await?;
        let (publish, status) = watch::channel(JobStatus::default());
        let mut watchers = JoinSet::new();
        watchers.spawn(watch_restarts(restarts, events.clone(), meters.clone()));
        let (waits, notice) = (director.waits(), common.limits.notice);
        watchers.spawn(watch_waits(waits.clone(), notice, events.clone(), meters.clone(), publish.clone()));
        let full_disk = {
            let (events, meters) = (events.clone(), meters.clone());
            Arc::new(move |error: &rehearsal_store::Error| {
                meters.set(process::DISK_FULL, 1.0);
                let _ = events.send(Event::DiskFull { message: error.to_string() });
            })
        };
        let archivist = director.archivist(store, full_disk).await?;
        let (commands, given) = mpsc::unbounded_channel();
        let setup = Setup {
            common,
            algorithm: config.algorithm_name(),
            roles: Roles::new(director, archivist.clone()),
            loaded,
            host: reward,
            devices: devices.noting(waits),
            results,
            meters,
            readiness,
            events,
            commands: given,
            status: publish,
            cancel,
        };
        let (mut run, algorithm) = start(setup, algorithm).await?;
        run.restore().await?;
        // A handle outlives its job, and must not hold the model.
        let (text, eos) = (Arc::new(run.model.text.clone()), run.model.architecture.eos.as_slice().into());
        let prompts = Arc::new(config.algorithm.prompts().cloned().unwrap_or_default());
        let live = Live {
            archivist,
            policy: run.policy(),
            reference: run.roles.reference.clone(),
            text,
            eos,
            prompts,
            cancel: run.cancel.clone(),
            pause: run.roles.director.pause_switch(),
            commands,
            status,
        };
        #[cfg(unix)]
        let socket = match access::serve(live.clone(), &run.common.job.directory).await {
            Ok(server) => Some(server),
            Err(e) => {
                tracing::warn!("other processes cannot read the job while it runs: {e}");
                None
            }
        };
        let view = view.serve(JobReader::live(&run.common.job.directory, live.clone()))?.map(|(server, url)| {
            run.tell(Event::ViewerServed { url });
            server
        });
        let running = Running {
            run,
            algorithm,
            _view: view,
            _watchers: watchers,
            _metrics: metrics,
            span,
            #[cfg(unix)]
            socket,
        };
        Ok((running, live))
    }
}

impl Running {
    /// Takes the job to its end.
    async fn drive(self) -> Result<Outcome> {
        let span = self.span.clone();
        let result = self.drive_in_span().instrument(span).await;
        // The job's models are gone by now.
        blocking(heap::trim).await;
        result
    }

    async fn drive_in_span(mut self) -> Result<Outcome> {
        let result = drive(&mut self.run, &mut *self.algorithm).await;
        // Before the store is released: who finds no socket waits for the store.
        #[cfg(unix)]
        drop(self.socket.take());
        self.run.roles.director.stop().await;
        self.run.tell(match &result {
            Ok(outcome) => Event::Finished(outcome.clone()),
            Err(e) => Event::Failed { kind: e.kind(), message: e.to_string() },
        });
        result
    }
}

/// The current directory.
fn here() -> String {
    std::env::current_dir().unwrap_or_default().display().to_string()
}

/// Why this build is slow, at the first call of the process.
fn slow_build() -> Option<String> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    rehearsal_lm::slow_build().filter(|_| !TOLD.swap(true, Ordering::Relaxed))
}

/// Loads the algorithm and everything else that is read. A host's reward takes the place of rules.
pub(super) fn load(config: &Config, host_reward: bool, origin: &Origin) -> Result<(Box<dyn LoadedAlgorithm>, Loaded)> {
    let rewards: Vec<_> =
        config.rewards.iter().filter(|source| !(host_reward && source.yields_to_host())).cloned().collect();
    let mut loader = Loader::new(&config.common, &rewards, origin.results, origin.day)?;
    let algorithm = config.algorithm.load(&mut loader)?;
    Ok((algorithm, loader.finish()))
}

/// Tells of restarted roles.
async fn watch_restarts(
    mut restarts: mpsc::UnboundedReceiver<DirectorEvent>,
    events: broadcast::Sender<Event>,
    meters: Arc<Meters>,
) {
    while let Some(event) = restarts.recv().await {
        if let DirectorEvent::Restarted { role, reason, restarts } = event {
            meters.set_series(counters::RESTARTS, role, f64::from(restarts));
            let _ = events.send(Event::RoleRestarted { role, reason });
        }
    }
}
