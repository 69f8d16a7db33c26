//! A job from the outside: build it, watch it, run or resume it, stop it.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use metrics::Recorder;
use rehearsal_actors::{
    ArchivistHandle, Devices, Director, DirectorEvent, Marked, Reward, RewardError, RewardModel, RewardModels,
    keep_normalisation,
};
use rehearsal_lm::{Checkpoint, HeadKind};
use rehearsal_store::Store;
use tokio::sync::{broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::config::judges::JudgeSource;
use crate::config::methods::{Advantages, Algorithm};
use crate::config::{Config, ModelSource};
use crate::data::{self, Data, Dropped, Prompts};
use crate::error::{At, Error, Result};
use crate::events::{Event, Outcome};
use crate::judge::{ApiJudge, HttpScorer, Judge, JudgeReward, LocalJudge, Memory, Template};
use crate::loops;
use crate::memory::MemoryBudget;
use crate::metrics::Meters;
use crate::rules::{Rules, WholeReward};
use crate::run::{Roles, Run};
use crate::state::JobState;
use crate::{embedded, exporter};

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
        let others = !config.models.models.is_empty() || self.config.judge.is_some() || self.config.scorer.is_some();
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
        let archivist = director.archivist(store, full_disk).await?;
        let roles = roles(&config, &inputs, reward, director, archivist, devices).await?;
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
            rows: self.data.as_ref().map_or(self.prompts.train.len(), Data::len),
            dropped: self.dropped.clone(),
        });
        let stopped = loop {
            let restarts = self.roles.director.restarts();
            match loops::run(self).await {
                Ok(()) => break false,
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

/// Starts the roles that an algorithm needs.
async fn roles(
    config: &Config,
    inputs: &Inputs,
    reward: Option<Arc<dyn Reward>>,
    director: Director,
    archivist: ArchivistHandle,
    devices: Devices,
) -> Result<Roles> {
    let algorithm = config.job.algorithm;
    let trained = |placement| config.trained(placement);
    let mut roles =
        Roles { director, archivist, policy: None, reference: None, reward: None, critic: None, buffer: None };
    let director = &roles.director;
    if algorithm == Algorithm::RewardModel {
        let model = inputs.critic.clone().unwrap_or_else(|| inputs.policy.clone());
        roles.critic = Some(director.critic(model, trained(config.placement.policy), devices).await?);
        return Ok(roles);
    }
    roles.policy =
        Some(director.policy(inputs.policy.clone(), trained(config.placement.policy), devices.clone()).await?);
    if algorithm != Algorithm::Sft {
        let (model, placement) = (inputs.reference.clone(), config.placement.reference);
        let budget = config.optimizer.micro_batch_tokens;
        roles.reference =
            Some(director.reference(model, placement, budget, config.model.dtype, devices.clone()).await?);
    }
    if !algorithm.is_offline() {
        let mut parts: Vec<(f64, Arc<dyn Reward>)> = reward.into_iter().map(|r| (1.0, r)).collect();
        if let Some(models) = reward_models(config, inputs, &devices)? {
            parts.push((config.reward.models.weight, Arc::new(models)));
        }
        if let (Some(settings), Some(judge)) = (&config.judge, judge(config, inputs, &devices, &roles.archivist)?) {
            parts.push((settings.weight, Arc::new(judge)));
        }
        if let Some(scorer) = &config.scorer {
            parts.push((scorer.weight, Arc::new(HttpScorer::new(scorer.endpoint.clone(), scorer.batch))));
        }
        let limits = &config.limits;
        roles.reward = Some(director.reward(Arc::new(WholeReward(parts))).await?);
        let group = config.rollout.completions_per_prompt;
        roles.buffer = Some(director.buffer(group, limits.rollouts_max, limits.staleness_max).await?);
    }
    if let Some(critic) = &inputs.critic {
        roles.critic = Some(director.critic(critic.clone(), trained(config.placement.critic), devices).await?);
    }
    Ok(roles)
}

fn reward_models(config: &Config, inputs: &Inputs, devices: &Devices) -> Result<Option<RewardModels>> {
    let settings = &config.reward.models;
    let tokenizer = inputs.policy.text.tokenizer_json();
    let one = |checkpoint: &Arc<Checkpoint>| {
        let budget = config.optimizer.micro_batch_tokens;
        let (placement, dtype) = (config.placement.reward, config.model.dtype);
        RewardModel::new("reward model", checkpoint, tokenizer, placement, dtype, budget, devices)
    };
    let members = inputs.reward_models.iter().map(one).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok((!members.is_empty()).then_some(RewardModels { members, ensemble: settings.ensemble, clip: settings.clip }))
}

/// The judge of a configuration, remembering in the job's store.
fn judge(
    config: &Config,
    inputs: &Inputs,
    devices: &Devices,
    archivist: &ArchivistHandle,
) -> Result<Option<JudgeReward>> {
    let Some(settings) = &config.judge else { return Ok(None) };
    let own = settings.template_file.as_ref().map(|file| fs::read_to_string(file).at(file)).transpose()?;
    let local = matches!(settings.source, JudgeSource::Local(_));
    let template = Template::new(&settings.template, own, local).map_err(Error::Rules)?;
    let judge: Box<dyn Judge> = match (&settings.source, &inputs.judge) {
        (JudgeSource::Api { model, endpoint, tokens_max }, _) => {
            Box::new(ApiJudge::new(model, endpoint.clone(), *tokens_max))
        }
        (JudgeSource::Local(_), Some(checkpoint)) => {
            let (placement, dtype) = (config.placement.reward, config.model.dtype);
            Box::new(LocalJudge::new(checkpoint.clone(), placement, dtype, devices).map_err(Error::Rules)?)
        }
        (JudgeSource::Local(_), None) => return Ok(None),
    };
    let memory = StoreMemory { archivist: archivist.clone(), runtime: tokio::runtime::Handle::current() };
    let memory: Arc<dyn Memory> = Arc::new(memory);
    Ok(Some(JudgeReward::new(judge, template, settings.mode, Some(memory), settings.calls_max)))
}

/// A judge's memory in the job's store. The reward's thread is not one of the host's, so it may wait for the archivist.
struct StoreMemory {
    archivist: ArchivistHandle,
    runtime: tokio::runtime::Handle,
}

impl Memory for StoreMemory {
    fn recall(&self, keys: &[String]) -> std::result::Result<Vec<Option<String>>, RewardError> {
        self.runtime.block_on(self.archivist.recall(keys.to_vec())).map_err(lost)
    }

    fn remember(&self, entries: Vec<(String, String)>) -> std::result::Result<(), RewardError> {
        if entries.is_empty() {
            return Ok(());
        }
        self.runtime.block_on(self.archivist.remember(entries)).map_err(lost)
    }
}

fn lost(e: rehearsal_actors::Error) -> RewardError {
    RewardError::Failed { name: "the judge's memory".into(), row: 0, reason: e.to_string() }
}

/// What a job reads before it begins.
struct Inputs {
    /// The model that is trained; of a reward model, its trunk.
    policy: Arc<Checkpoint>,
    /// The same copy when it is the same model.
    reference: Arc<Checkpoint>,
    /// With a score head.
    critic: Option<Arc<Checkpoint>>,
    reward_models: Vec<Arc<Checkpoint>>,
    judge: Option<Arc<Checkpoint>>,
    prompts: Prompts,
    data: Option<Data>,
    pretraining: Vec<Marked>,
    dropped: Dropped,
    /// Steps of the job, where it counts epochs.
    steps: Option<u64>,
    /// What a resumed job must have in common with the one before it.
    fingerprint: Vec<(String, String)>,
}

impl Inputs {
    async fn load(config: &Config) -> Result<Self> {
        let config = config.clone();
        blocking(move || Self::read(&config)).await
    }

    fn read(config: &Config) -> Result<Self> {
        let algorithm = config.job.algorithm;
        let mut models = Models::default();
        let mut fingerprint = config.fingerprint();
        let policy = models.load(&config.model.policy)?;
        let reference = models.load(&config.model.reference)?;
        let reward_models = config.reward.models.models.iter().map(|m| models.load(m)).collect::<Result<Vec<_>>>()?;
        let (a, b) = (policy.architecture.vocab, reference.architecture.vocab);
        if a != b {
            let message =
                format!("the reference has a vocabulary of {b}, the policy of {a}; they must share their tokenizer");
            return Err(rehearsal_lm::Error::Config(message).into());
        }
        fingerprint.push(("model.policy, its weights".into(), policy.fingerprint()?));
        fingerprint.push(("model.reference, its weights".into(), reference.fingerprint()?));
        // A start that another role reads already is shared with it.
        let scored = |model: Arc<Checkpoint>| -> Result<Arc<Checkpoint>> {
            match model.architecture.head {
                HeadKind::Score => Ok(model),
                HeadKind::Language => Ok(Arc::new(model.rounded(DType::F32)?.with_score_head(config.job.seed)?)),
            }
        };
        let critic = match algorithm {
            Algorithm::RewardModel => Some(scored(policy.clone())?),
            Algorithm::Ppo if config.ppo.advantages == Advantages::Gae => {
                let source = config.critic.model.as_ref().or(config.reward.models.models.first());
                Some(scored(models.load(source.unwrap_or(&config.model.policy))?)?)
            }
            _ => None,
        };
        for (name, model) in
            critic.iter().map(|c| ("critic", c)).chain(reward_models.iter().map(|m| ("reward model", m)))
        {
            fingerprint.push((format!("{name}, its weights"), model.fingerprint()?));
        }
        let judge = match config.judge.as_ref().map(|j| &j.source) {
            Some(JudgeSource::Local(source)) if !algorithm.is_offline() => Some(models.load(source)?),
            _ => None,
        };
        if let Some(judge) = &judge {
            fingerprint.push(("judge, its weights".into(), judge.fingerprint()?));
        }
        let (data, mut dropped) = Data::load(config, &policy.text, &policy.architecture)?;
        let mut prompts = Prompts::default();
        if let Some(data) = &data {
            fingerprint.push(("the data".into(), data.fingerprint()));
        } else {
            let room = policy.architecture.context.saturating_sub(config.rollout.max_new_tokens);
            prompts = Prompts::load(config, &policy.text, room)?;
            fingerprint.push(("the prompts".into(), prompts.fingerprint()));
            dropped.absorb(&prompts);
        }
        let text = match algorithm {
            Algorithm::Ppo => config.ppo.pretraining.as_ref(),
            Algorithm::RewardModel => config.reward_model.demonstrations.as_ref(),
            _ => None,
        };
        let pretraining = match text {
            Some(file) => data::demonstrations(config, file, &policy.text, &policy.architecture)?,
            None => Vec::new(),
        };
        let rows = data.as_ref().map_or(0, Data::len) as f64;
        let steps = (config.data.epochs > 0.0 && algorithm.is_offline())
            .then(|| ((config.data.epochs * rows / config.data.batch_size as f64).ceil() as u64).max(1));
        // Held as it is computed with where it is frozen; the trained copy is f32 in any case.
        let dtype = config.model.dtype.dtype();
        let rounded = |model: Arc<Checkpoint>| Ok::<_, Error>(Arc::new(model.rounded(dtype)?));
        let same = Arc::ptr_eq(&policy, &reference);
        let policy = if dtype == DType::F32 { policy } else { rounded(policy)? };
        let reference = match (same, dtype) {
            (true, _) => policy.clone(),
            (false, DType::F32) => reference,
            (false, _) => rounded(reference)?,
        };
        Ok(Self {
            policy,
            reference,
            critic,
            reward_models,
            judge,
            prompts,
            data,
            pretraining,
            dropped,
            steps,
            fingerprint,
        })
    }
}

/// Models that several roles start from are read once.
#[derive(Default)]
struct Models(Vec<(ModelSource, Arc<Checkpoint>)>);

impl Models {
    fn load(&mut self, source: &ModelSource) -> Result<Arc<Checkpoint>> {
        if let Some((_, model)) = self.0.iter().find(|(s, _)| s == source) {
            return Ok(model.clone());
        }
        let model = Arc::new(load_model(source)?);
        self.0.push((source.clone(), model.clone()));
        Ok(model)
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
