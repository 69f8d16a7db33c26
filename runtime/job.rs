//! A job from the outside: build it, watch it, run or resume it, stop it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use metrics::Recorder;
use rehearsal_actors::{Devices, Director, DirectorEvent, Reward, keep_normalisation};
use rehearsal_store::Store;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::config::methods::Algorithm;
use crate::data::Data;
use crate::error::{At, Error, Result};
use crate::events::{Event, Outcome};
use crate::exporter::Readiness;
use crate::inputs::Inputs;
use crate::memory::MemoryBudget;
use crate::metrics::Meters;
use crate::metrics::table::{counters, process};
use crate::rules::Rules;
use crate::run::Run;
use crate::state::JobState;
use crate::{cast, exporter, loops};

/// Events kept for a watcher that falls behind; it then misses the oldest.
const EVENTS_KEPT: usize = 4096;
/// The configuration's copy in the job's directory.
pub const CONFIG_FILE: &str = "job.toml";
/// The trained model, in the job's directory, once the job is done.
pub const MODEL_FOLDER: &str = "model";
const FINGERPRINT: &str = "fingerprint";

/// Puts a job together.
pub struct JobBuilder {
    config: Config,
    source: Option<String>,
    reward: Option<Arc<dyn Reward>>,
    recorder: Option<Arc<dyn Recorder + Send + Sync>>,
}

impl JobBuilder {
    /// The reward, in the place of the configuration's rules.
    pub fn reward(mut self, reward: impl Reward) -> Self {
        self.reward = Some(Arc::new(reward));
        self
    }

    /// Where metrics go; nothing is installed globally. Without it they go to `metrics.listen`, or nowhere.
    pub fn recorder(mut self, recorder: Arc<dyn Recorder + Send + Sync>) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// The text of the configuration, kept with the job so that `rehearsal resume DIR` finds it.
    pub fn source(mut self, toml: impl Into<String>) -> Self {
        self.source = Some(toml.into());
        self
    }

    /// The job, not yet started.
    pub fn build(self) -> Result<Job> {
        let config = &self.config.reward;
        let rules = match self.reward {
            Some(reward) => Some(reward),
            None if config.rules.is_empty() => None,
            None => Some(Arc::new(Rules::new(config).map_err(Error::Rules)?) as Arc<dyn Reward>),
        };
        let others = !config.models.models.is_empty()
            || self.config.judge.is_some()
            || self.config.scorer.is_some()
            || self.config.encoder.is_some()
            || self.config.people.is_some();
        if rules.is_none() && !others && !self.config.job.algorithm.is_offline() {
            return Err(Error::NoReward);
        }
        let events = broadcast::channel(EVENTS_KEPT).0;
        Ok(Job { config: self.config, source: self.source, reward: rules, recorder: self.recorder, events })
    }
}

/// A job that can be run or resumed.
pub struct Job {
    config: Config,
    source: Option<String>,
    /// The host's, or the configuration's rules; trained reward models come on top.
    reward: Option<Arc<dyn Reward>>,
    recorder: Option<Arc<dyn Recorder + Send + Sync>>,
    events: broadcast::Sender<Event>,
}

impl Job {
    /// Begins to put a job together.
    pub fn builder(config: Config) -> JobBuilder {
        JobBuilder { config, source: None, reward: None, recorder: None }
    }

    /// Where everything the job makes is kept.
    pub fn directory(&self) -> &Path {
        &self.config.job.directory
    }

    /// What happens, as it happens, from the moment of this call.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Runs the job in a new directory. Cancelling `cancel` saves a checkpoint and ends it.
    pub async fn run(self, cancel: CancellationToken) -> Result<Outcome> {
        // Nothing is written before the input is known to be good.
        let inputs = Inputs::load(&self.config).await?;
        let (mut store, repairs) = open(self.config.job.directory.clone()).await?;
        if store.get_job::<Vec<(String, String)>>(FINGERPRINT)?.is_some() {
            return Err(Error::Exists(self.config.job.directory));
        }
        if let Some(source) = &self.source {
            let path = self.config.job.directory.join(CONFIG_FILE);
            fs::write(&path, source).at(&path)?;
        }
        // Last: a job that was killed before this may simply be run again.
        store.put_job(FINGERPRINT, &inputs.fingerprint)?;
        self.work(inputs, store, repairs, cancel).await
    }

    /// Goes on with a job that was cut off: the result is that of a job that never was.
    pub async fn resume(self, cancel: CancellationToken) -> Result<Outcome> {
        let directory = self.config.job.directory.clone();
        if !directory.join("store").is_dir() {
            return Err(Error::NothingToResume(directory));
        }
        let inputs = Inputs::load(&self.config).await?;
        let (mut store, repairs) = open(directory.clone()).await?;
        let now = &inputs.fingerprint;
        match store.get_job::<Vec<(String, String)>>(FINGERPRINT)? {
            None if store.checkpoints()?.is_empty() => return Err(Error::NothingToResume(directory)),
            // A database made again from its checkpoints knows no settings; the caller's count.
            None => store.put_job(FINGERPRINT, now)?,
            Some(then) if then != *now => {
                let changed = then.iter().zip(now).filter(|(a, b)| a != b);
                let differences: Vec<String> =
                    changed.map(|(a, b)| format!("  {}\n    then: {}\n    now:  {}", a.0, a.1, b.1)).collect();
                return Err(Error::Changed { directory, differences: differences.join("\n") });
            }
            Some(_) => {}
        }
        self.work(inputs, store, repairs, cancel).await
    }

    async fn work(
        self,
        inputs: Inputs,
        store: Store,
        repairs: Vec<rehearsal_store::Repair>,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        let Job { mut config, reward, recorder, events, .. } = self;
        let tell = |event| drop(events.send(event));
        for repair in repairs {
            tell(Event::Repaired { message: repair.0 });
        }
        if let Some(steps) = inputs.steps {
            config.job.steps = steps;
        }
        let prometheus = match (&recorder, config.metrics.listen) {
            (None, Some(address)) => Some((exporter::recorder(), address)),
            _ => None,
        };
        let meters = Arc::new(match (&recorder, &prometheus) {
            (Some(recorder), _) => Meters::new(Some(&**recorder)),
            (None, Some((recorder, _))) => Meters::new(Some(recorder)),
            (None, None) => Meters::new(None),
        });
        let readiness = Readiness::default();
        let _server = match &prometheus {
            Some((recorder, address)) => Some(exporter::serve(recorder.handle(), *address, readiness.clone()).await?),
            None => None,
        };

        let (director_events, mut restarts) = mpsc::unbounded_channel();
        let director = Director::start(config.limits.restarts_max, config.limits.request, director_events).await?;
        let watcher = {
            let (events, meters) = (events.clone(), meters.clone());
            tokio::spawn(async move {
                while let Some(event) = restarts.recv().await {
                    if let DirectorEvent::Restarted { role, reason, restarts } = event {
                        meters.set_series(counters::RESTARTS, role, f64::from(restarts));
                        let _ = events.send(Event::RoleRestarted { role, reason });
                    }
                }
            })
        };
        let full_disk = {
            let (events, meters) = (events.clone(), meters.clone());
            Arc::new(move |error: &rehearsal_store::Error| {
                meters.set(process::DISK_FULL, 1.0);
                let _ = events.send(Event::DiskFull { message: error.to_string() });
            })
        };
        let devices = Devices::new(config.placement.threads)?;
        let archivist = director.archivist(store, full_disk).await?;
        let roles = cast::start(&config, &inputs, reward, director, archivist, devices, &cancel).await?;
        if let Some((_, url)) = &roles.page {
            let _ = events.send(Event::PeopleWanted { url: url.clone() }); // not logged: it may hold the token
        }
        let Inputs { policy, prompts, data, pretraining, dropped, .. } = inputs;
        let budget = match config.job.algorithm {
            Algorithm::OnlineDpo => MemoryBudget::predict(&config, &policy.architecture, prompts.mean_tokens()),
            _ => None,
        };
        let mut run = Run {
            config,
            roles,
            state: JobState::default(),
            prompts,
            data,
            pretraining,
            dropped,
            model: policy,
            meters,
            readiness,
            events,
            cancel,
            saved: None,
            writing: None,
            last: serde_json::Value::Null,
            budget,
        };
        let result = run.finish().await;
        run.readiness.set(false);
        run.roles.director.stop().await;
        watcher.abort();
        if let Ok(outcome) = &result {
            run.tell(Event::Finished(outcome.clone()));
        }
        result
    }
}

impl Run {
    /// Restores, then runs the loop until it ends, going back to the last checkpoint whenever a role dies.
    async fn finish(&mut self) -> Result<Outcome> {
        self.restore().await?;
        self.readiness.set(true);
        self.tell(Event::Started {
            step: self.state.step,
            steps: self.config.job.steps,
            parameters: self.model.parameters.values().map(|t| t.elem_count() as u64).sum(),
            rows: self.data.as_ref().map_or(self.prompts.train.len(), Data::len),
            dropped: self.dropped.clone(),
        });
        let stopped = loop {
            let restarts = self.roles.director.restarts();
            match loops::run(self).await {
                Ok(()) => match self.settle().await {
                    Ok(()) => break false,
                    Err(e) if e.is_death() => self.recover(restarts + 1).await?,
                    Err(e) => return Err(e),
                },
                Err(e) if e.is_cancelled() || e.is_spent() => {
                    if e.is_spent() {
                        self.tell(Event::BudgetSpent { message: e.to_string() });
                    }
                    self.checkpoint().await?;
                    break true;
                }
                Err(e) if e.is_death() => self.recover(restarts + 1).await?,
                Err(e) => return Err(e),
            }
        };
        if !stopped {
            self.export().await?;
        }
        Ok(Outcome {
            directory: self.config.job.directory.clone(),
            step: self.state.step,
            steps: self.config.job.steps,
            stopped,
            evaluations: self.state.evaluations.clone(),
        })
    }

    /// Writes the trained model beside the store, as a Hugging Face directory; all of it, or what was there before.
    async fn export(&mut self) -> Result<()> {
        let (temporary, last) =
            (self.config.job.directory.join("model.tmp"), self.config.job.directory.join(MODEL_FOLDER));
        match (&self.roles.policy, &self.roles.critic) {
            (Some(policy), _) => policy.export(temporary.clone(), DType::F32).await?,
            (None, Some(critic)) => {
                critic.export(temporary.clone(), DType::F32).await?;
                if let Some(normalisation) = loops::finish_reward_model(self).await? {
                    keep_normalisation(&temporary, &normalisation).at(&temporary)?;
                }
            }
            (None, None) => return Ok(()),
        }
        if last.exists() {
            fs::remove_dir_all(&last).at(&last)?;
        }
        fs::rename(&temporary, &last).at(&last)
    }

    /// Waits until the dead are dealt with and goes back to the last checkpoint, however often a role dies meanwhile.
    async fn recover(&mut self, mut restarts: u32) -> Result<()> {
        self.readiness.set(false);
        loop {
            self.roles.director.settled(restarts).await;
            if let Some(failure) = self.roles.director.failure() {
                return Err(failure.into());
            }
            match self.restore().await {
                Err(e) if e.is_death() => restarts += 1,
                other => {
                    self.readiness.set(other.is_ok());
                    return other;
                }
            }
        }
    }
}

async fn open(directory: std::path::PathBuf) -> Result<(Store, Vec<rehearsal_store::Repair>)> {
    Ok(blocking(move || Store::open(&directory)).await?)
}

/// Runs blocking work off the host's async threads.
pub(crate) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(f).await {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
