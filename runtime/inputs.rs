//! What a job reads before it begins: models, data, prompts, each once, and what a resumed job must have in common.

use std::path::Path;
use std::sync::Arc;

use candle_core::DType;
use rehearsal_actors::Marked;
use rehearsal_lm::{Checkpoint, HeadKind};

use crate::config::judges::JudgeSource;
use crate::config::methods::{Advantages, Algorithm};
use crate::config::{Config, ModelSource};
use crate::data::{self, Data, Dropped, Prompts};
use crate::embedded;
use crate::error::{Error, Result};
use crate::job::blocking;
use crate::judge::JudgeModel;
use crate::transformers::{BertEncoder, CausalModel};

/// What a job reads before it begins.
pub(crate) struct Inputs {
    /// The model that is trained; of a reward model, its trunk.
    pub policy: Arc<Checkpoint>,
    /// The same copy when it is the same model.
    pub reference: Arc<Checkpoint>,
    /// With a score head.
    pub critic: Option<Arc<Checkpoint>>,
    pub reward_models: Vec<Arc<Checkpoint>>,
    pub judge: Option<JudgeModel>,
    pub encoder: Option<Arc<BertEncoder>>,
    pub prompts: Prompts,
    pub data: Option<Data>,
    pub pretraining: Vec<Marked>,
    pub dropped: Dropped,
    /// Steps of the job, where it counts epochs.
    pub steps: Option<u64>,
    /// What a resumed job must have in common with the one before it.
    pub fingerprint: Vec<(String, String)>,
}

impl Inputs {
    /// Reads and checks everything; nothing is written before this has gone well.
    pub async fn load(config: &Config) -> Result<Self> {
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
                // A reward model that reads other tokens than the policy writes cannot value them.
                let same = |m: &&Arc<Checkpoint>| m.text.tokenizer_json() == policy.text.tokenizer_json();
                match &config.critic.model {
                    Some(source) => {
                        let critic = models.load(source)?;
                        if !same(&&critic) {
                            let message = "the critic's tokenizer is not the policy's; name a model that has the same in `critic.model`";
                            return Err(rehearsal_lm::Error::Config(message.into()).into());
                        }
                        Some(scored(critic)?)
                    }
                    None => Some(scored(reward_models.first().filter(same).unwrap_or(&policy).clone())?),
                }
            }
            _ => None,
        };
        for (name, model) in
            critic.iter().map(|c| ("critic", c)).chain(reward_models.iter().map(|m| ("reward model", m)))
        {
            fingerprint.push((format!("{name}, its weights"), model.fingerprint()?));
        }
        let judge = match config.judge.as_ref().map(|j| &j.source) {
            Some(JudgeSource::Local(ModelSource::Path(path)))
                if !algorithm.is_offline() && CausalModel::supports(path) =>
            {
                Some(JudgeModel::Transformers(Arc::new(CausalModel::open(path).map_err(Error::Usage)?)))
            }
            Some(JudgeSource::Local(source)) if !algorithm.is_offline() => {
                Some(JudgeModel::Native(models.load(source)?))
            }
            _ => None,
        };
        if let Some(judge) = &judge {
            fingerprint.push(("judge, its weights".into(), judge.fingerprint().map_err(Error::Usage)?));
        }
        let encoder = match config.encoder.as_ref().filter(|_| !algorithm.is_offline()) {
            Some(settings) => Some(Arc::new(BertEncoder::open(&settings.model).map_err(Error::Usage)?)),
            None => None,
        };
        if let Some(encoder) = &encoder {
            fingerprint.push(("encoder, its weights".into(), encoder.name().into()));
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
            encoder,
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
