//! A job from the outside: build it, watch it, run or resume it, stop it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use metrics::Recorder;
use rehearsal_actors::{Devices, Director, DirectorEvent, Reward};
use rehearsal_lm::Checkpoint;
use rehearsal_store::Store;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, ModelSource};
use crate::error::{At, Error, Result};
use crate::events::{Event, Outcome};
use crate::loops;
use crate::memory::MemoryBudget;
use crate::metrics::Meters;
use crate::prompts::Prompts;
use crate::rules::Rules;
use crate::run::{Roles, Run};
use crate::state::JobState;
use crate::{embedded, exporter};

/// Events kept for a watcher that falls behind; it then misses the oldest.
const EVENTS_KEPT: usize = 4096;
/// The configuration's copy in the job's directory.
pub const CONFIG_FILE: &str = "job.toml";
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
        let reward = match self.reward {
            Some(reward) => reward,
            None if self.config.reward.rules.is_empty() => return Err(Error::NoReward),
            None => Arc::new(Rules::new(&self.config.reward).map_err(Error::Rules)?),
        };
        let events = broadcast::channel(EVENTS_KEPT).0;
        Ok(Job { config: self.config, source: self.source, reward, recorder: self.recorder, events })
    }
}

/// A job that can be run or resumed.
pub struct Job {
    config: Config,
    source: Option<String>,
    reward: Arc<dyn Reward>,
    recorder: Option<Arc<dyn Recorder + Send + Sync>>,
    events: broadcast::Sender<Event>,
}

impl Job {
    /// Begins to put a job together.
    pub fn builder(config: Config) -> JobBuilder {
        JobBuilder { config, source: None, reward: None, recorder: None }
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
        let Job { config, reward, recorder, events, .. } = self;
        let tell = |event| drop(events.send(event));
        for repair in repairs {
            tell(Event::Repaired { message: repair.0 });
        }
        let Inputs { policy, reference, prompts, .. } = inputs;
        let prometheus = match (&recorder, config.metrics.listen) {
            (None, Some(address)) => Some((exporter::recorder(), address)),
            _ => None,
        };
        let meters = Arc::new(match (&recorder, &prometheus) {
            (Some(recorder), _) => Meters::new(Some(&**recorder)),
            (None, Some((recorder, _))) => Meters::new(Some(recorder)),
            (None, None) => Meters::new(None),
        });
        let _server = match &prometheus {
            Some((recorder, address)) => Some(exporter::serve(recorder.handle(), *address).await?),
            None => None,
        };

        let (director_events, mut restarts) = mpsc::unbounded_channel();
        let director = Director::start(config.limits.restarts_max, config.limits.request, director_events).await?;
        let watcher = {
            let (events, meters) = (events.clone(), meters.clone());
            tokio::spawn(async move {
                while let Some(event) = restarts.recv().await {
                    if let DirectorEvent::Restarted { role, reason, restarts } = event {
                        meters.set("restarts_total", role, f64::from(restarts));
                        let _ = events.send(Event::RoleRestarted { role, reason });
                    }
                }
            })
        };
        let full_disk = {
            let (events, meters) = (events.clone(), meters.clone());
            Arc::new(move |error: &rehearsal_store::Error| {
                meters.set("disk_full", "", 1.0);
                let _ = events.send(Event::DiskFull { message: error.to_string() });
            })
        };
        let devices = Devices::new(config.placement.threads)?;
        let roles = Roles {
            archivist: director.archivist(store, full_disk).await?,
            policy: director.policy(policy.clone(), config.policy(), devices.clone()).await?,
            reference: director
                .reference(
                    reference,
                    config.placement.reference,
                    config.optimizer.micro_batch_tokens,
                    config.model.dtype,
                    devices,
                )
                .await?,
            reward: director.reward(reward).await?,
            buffer: director
                .buffer(config.rollout.completions_per_prompt, config.limits.rollouts_max, config.limits.staleness_max)
                .await?,
            director,
        };
        let budget = MemoryBudget::predict(&config, &policy.architecture, prompts.mean_tokens());
        let mut run = Run {
            config,
            roles,
            state: JobState::default(),
            prompts,
            model: policy,
            meters,
            events,
            cancel,
            saved: None,
            last: serde_json::Value::Null,
            budget,
        };
        let result = run.finish().await;
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
        self.tell(Event::Started {
            step: self.state.step,
            steps: self.config.job.steps,
            parameters: self.model.parameters.values().map(|t| t.elem_count() as u64).sum(),
            prompts: self.prompts.train.len(),
            skipped: self.prompts.bad_lines + self.prompts.too_long,
        });
        let stopped = loop {
            let restarts = self.roles.director.restarts();
            match loops::online_dpo(self).await {
                Ok(()) => break false,
                Err(e) if e.is_cancelled() => {
                    self.checkpoint().await?;
                    break true;
                }
                Err(e) if e.is_death() => self.recover(restarts + 1).await?,
                Err(e) => return Err(e),
            }
        };
        Ok(Outcome {
            directory: self.config.job.directory.clone(),
            step: self.state.step,
            steps: self.config.job.steps,
            stopped,
            evaluations: self.state.evaluations.clone(),
        })
    }

    /// Waits until the dead are dealt with and goes back to the last checkpoint, however often a role dies meanwhile.
    async fn recover(&mut self, mut restarts: u32) -> Result<()> {
        loop {
            self.roles.director.settled(restarts).await;
            if let Some(failure) = self.roles.director.failure() {
                return Err(failure.into());
            }
            match self.restore().await {
                Err(e) if e.is_death() => restarts += 1,
                other => return other,
            }
        }
    }
}

async fn open(directory: std::path::PathBuf) -> Result<(Store, Vec<rehearsal_store::Repair>)> {
    Ok(blocking(move || Store::open(&directory)).await?)
}

/// What a job reads before it begins.
struct Inputs {
    policy: Arc<Checkpoint>,
    /// The same copy when it is the same model.
    reference: Arc<Checkpoint>,
    prompts: Prompts,
    /// What a resumed job must have in common with the one before it.
    fingerprint: Vec<(String, String)>,
}

impl Inputs {
    async fn load(config: &Config) -> Result<Self> {
        let config = config.clone();
        blocking(move || {
            let (policy, reference) = (&config.model.policy, &config.model.reference);
            let first = load_model(policy)?;
            let second = if reference == policy { None } else { Some(load_model(reference)?) };
            let of_reference = second.as_ref().unwrap_or(&first);
            let (a, b) = (first.architecture.vocab, of_reference.architecture.vocab);
            if a != b {
                let message = format!(
                    "the reference has a vocabulary of {b}, the policy of {a}; they must share their tokenizer"
                );
                return Err(rehearsal_lm::Error::Config(message).into());
            }
            let room = first.architecture.context.saturating_sub(config.rollout.max_new_tokens);
            let prompts = Prompts::load(&config, &first.text, room)?;
            let mut fingerprint = config.fingerprint();
            fingerprint.push(("model.policy, its weights".into(), first.fingerprint()?));
            fingerprint.push(("model.reference, its weights".into(), of_reference.fingerprint()?));
            fingerprint.push(("the prompts".into(), prompts.fingerprint()));
            // Held as the reference computes; the trained copy is f32 in any case.
            let dtype = config.model.dtype.dtype();
            let first = Arc::new(first.with_dtype(dtype)?);
            let second = match second {
                Some(second) => Arc::new(second.with_dtype(dtype)?),
                None => first.clone(),
            };
            Ok(Self { policy: first, reference: second, prompts, fingerprint })
        })
        .await
    }
}

/// Reads a model.
pub(crate) fn load_model(source: &ModelSource) -> Result<Checkpoint> {
    match source {
        ModelSource::Embedded => Ok(embedded::model()?),
        ModelSource::Path(path) => Ok(Checkpoint::open(Path::new(path))?),
    }
}

/// Runs blocking work off the host's async threads.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(f).await {
        Ok(value) => value,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
