//! What an algorithm may read before its job begins, and what a resumed job must have in common.

use std::sync::Arc;

use candle_core::DType;
use rehearsal_actors::MaskedSequence;
use rehearsal_lm::{Checkpoint, HeadKind};

use crate::config::ModelSource;
use crate::data::{DataSettings, Dropped, Prompts, PromptsSettings, RowReader, Rows};
use crate::error::{At, Result};
use crate::models::ModelCache;
use crate::rewards::{LoadedReward, RewardInputs, RewardSource};
use crate::settings::Common;

/// Reads models, data and sources of rewards. Nothing is written before all of it has succeeded.
pub struct Loader<'a> {
    /// The sections that every job has.
    pub common: &'a Common,
    rewards: &'a [Box<dyn RewardSource>],
    /// Version of the arithmetic that the job was begun with.
    results: u32,
    models: ModelCache,
    policy: Arc<Checkpoint>,
    loaded: Loaded,
}

/// What was read beside the algorithm's own inputs.
pub struct Loaded {
    /// The start of the policy, rounded to `model.dtype`. The trained copy is f32.
    pub policy: Arc<Checkpoint>,
    /// Sources of rewards, in the order in which their scores are added.
    pub rewards: Vec<Box<dyn LoadedReward>>,
    /// Rows or prompts to train on.
    pub rows: usize,
    /// Rows that were left out, by reason.
    pub dropped: Dropped,
    /// Steps of the job, where it counts epochs.
    pub steps: Option<u64>,
    /// Hashes of everything that was read, by name.
    pub fingerprint: Vec<(String, String)>,
    /// Average length of a prompt in tokens, rounded up.
    pub prompt_tokens: u64,
    /// The first rows as the model reads them.
    pub first: Vec<Vec<String>>,
}

/// Rows that [`Loaded::first`] holds.
const FIRST: usize = 3;

impl<'a> Loader<'a> {
    /// Loads the policy's start. Chat templates that print the date print `day`, in days after 1 January 1970.
    pub fn new(
        common: &'a Common,
        rewards: &'a [Box<dyn RewardSource>],
        results: u32,
        day: Option<u32>,
    ) -> Result<Self> {
        let mut models = ModelCache::new(day);
        let policy = models.load(&common.model.policy())?;
        let mut fingerprint = vec![("model.policy, its weights".to_string(), policy.fingerprint()?)];
        if let Some(adapter) = &common.lora.adapter {
            let weights = adapter.join("adapter_model.safetensors");
            let bytes = std::fs::read(&weights).at(&weights)?;
            fingerprint.push(("lora.adapter, its weights".into(), blake3::hash(&bytes).to_hex()[..16].into()));
        }
        let loaded = Loaded {
            policy: frozen(common, &policy)?,
            rewards: Vec::new(),
            rows: 0,
            dropped: Dropped::default(),
            steps: None,
            fingerprint,
            prompt_tokens: 0,
            first: Vec::new(),
        };
        Ok(Self { common, rewards, results, models, policy, loaded })
    }

    /// What was read, once the algorithm has its own.
    pub fn finish(self) -> Loaded {
        self.loaded
    }

    /// The start of the policy, rounded to `model.dtype`. The trained copy is f32.
    pub fn policy(&self) -> Arc<Checkpoint> {
        self.loaded.policy.clone()
    }

    /// The reference: the named model, or the policy as it starts, with `lora.adapter`. The policy's own copy where it is the
    /// same model.
    pub fn reference(&mut self) -> Result<Arc<Checkpoint>> {
        let reference = self.models.load(&self.common.model.reference())?;
        let (a, b) = (self.policy.architecture.vocab, reference.architecture.vocab);
        if a != b {
            let message =
                format!("the reference has a vocabulary of {b}, the policy of {a}; they must share their tokenizer");
            return Err(rehearsal_lm::Error::Config(message).into());
        }
        self.loaded.fingerprint.push(("model.reference, its weights".into(), reference.fingerprint()?));
        if !Arc::ptr_eq(&reference, &self.policy) {
            return frozen(self.common, &reference);
        }
        match self.common.lora_init().filter(|lora| lora.adapter.is_some() && self.results >= 2) {
            Some(start) => frozen(self.common, &Arc::new(start.merged(&self.policy)?)),
            None => Ok(self.policy()),
        }
    }

    /// The policy's start under a score head: a reward model to train.
    pub fn reward_model(&mut self) -> Result<Arc<Checkpoint>> {
        let model = scored(self.common, &self.policy)?;
        self.loaded.fingerprint.push(("critic, its weights".into(), model.fingerprint()?));
        Ok(model)
    }

    /// A critic: the named model, or the first reward model that has the policy's tokenizer, or the policy, under a score
    /// head.
    pub fn critic(
        &mut self,
        named: Option<&ModelSource>,
        reward_models: &[Arc<Checkpoint>],
    ) -> Result<Arc<Checkpoint>> {
        // A model that reads other tokens than the policy writes cannot value them.
        let tokenizer = self.policy.text.tokenizer_json().to_string();
        let same = |m: &&Arc<Checkpoint>| m.text.tokenizer_json() == tokenizer;
        let start = match named {
            Some(source) => {
                let critic = self.models.load(source)?;
                if !same(&&critic) {
                    let message =
                        "the critic's tokenizer is not the policy's; name a model that has the same in `critic.model`";
                    return Err(rehearsal_lm::Error::Config(message.into()).into());
                }
                critic
            }
            None => reward_models.first().filter(same).unwrap_or(&self.policy).clone(),
        };
        let critic = scored(self.common, &start)?;
        self.loaded.fingerprint.push(("critic, its weights".into(), critic.fingerprint()?));
        Ok(critic)
    }

    /// Loads the configured sources of rewards; returns the reward models among them.
    pub fn rewards(&mut self) -> Result<Vec<Arc<Checkpoint>>> {
        let mut reward_models = Vec::new();
        for source in self.rewards.iter().filter(|source| source.is_configured()) {
            let loaded = source.load(&mut RewardInputs {
                models: &mut self.models,
                policy: &self.policy,
                fingerprint: &mut self.loaded.fingerprint,
                reward_models: &mut reward_models,
            })?;
            self.loaded.rewards.push(loaded);
        }
        Ok(reward_models)
    }

    /// The prompts of an online algorithm whose completions have `max_new_tokens` tokens at most.
    pub fn prompts(&mut self, settings: &PromptsSettings, max_new_tokens: usize) -> Result<Prompts> {
        let context = self.policy.architecture.context.saturating_sub(max_new_tokens);
        let prompts = Prompts::load(settings, &self.common.evaluation, &self.policy.text, context)?;
        let all = prompts.train.iter().chain(&prompts.held_out);
        self.check_vocabulary(all.flat_map(|row| row.tokens.iter().copied()).max())?;
        let loaded = &mut self.loaded;
        loaded.fingerprint.push(("the prompts".into(), prompts.fingerprint()));
        loaded.dropped.add_rows("cannot be used", prompts.bad_lines);
        loaded.dropped.add_rows("is too long", prompts.too_long);
        loaded.rows = prompts.train.len();
        loaded.prompt_tokens = prompts.mean_tokens();
        let first = prompts.train.iter().take(FIRST).map(|row| Ok(vec![self.policy.text.decode_all(&row.tokens)?]));
        loaded.first = first.collect::<Result<_>>()?;
        Ok(prompts)
    }

    /// The rows of an offline algorithm, read by one of [`RowReader`]'s methods.
    pub fn rows<T: crate::data::Content>(
        &mut self,
        data: &DataSettings,
        prompts: &PromptsSettings,
        read: fn(&mut RowReader<'_>) -> Result<Rows<T>>,
    ) -> Result<Rows<T>> {
        let mut reader = reader(self.common, data, prompts, &self.policy);
        let rows = read(&mut reader)?;
        self.check_vocabulary(rows.train.iter().chain(&rows.held_out).map(T::largest_token).max())?;
        self.loaded.dropped = reader.dropped;
        self.loaded.fingerprint.push(("the data".into(), rows.fingerprint()));
        self.loaded.rows = rows.train.len();
        let text = |tokens: Vec<u32>| Ok(self.policy.text.decode_all(&tokens)?);
        let first = rows.train.iter().take(FIRST).map(|row| row.sequences().into_iter().map(text).collect());
        self.loaded.first = first.collect::<Result<_>>()?;
        if data.epochs > 0.0 {
            let steps = (data.epochs * rows.train.len() as f64 / data.batch_size as f64).ceil() as u64;
            self.loaded.steps = Some(steps.max(1));
        }
        Ok(rows)
    }

    /// An error if the largest token of prompts or rows is none of the policy's.
    fn check_vocabulary(&self, largest: Option<u32>) -> Result<()> {
        let vocab = self.policy.architecture.vocab;
        match largest.filter(|&token| token as usize >= vocab) {
            Some(token) => Err(rehearsal_lm::Error::TokenOutOfVocabulary { token, vocab }.into()),
            None => Ok(()),
        }
    }

    /// Demonstrations of a file of its own, such as pretraining text.
    pub fn demonstrations(
        &mut self,
        data: &DataSettings,
        prompts: &PromptsSettings,
        file: &std::path::Path,
    ) -> Result<Vec<MaskedSequence>> {
        let train = reader(self.common, data, prompts, &self.policy).demonstrations_of(file)?;
        let rows = Rows { train, held_out: Vec::new() };
        self.loaded.fingerprint.push(("the demonstrations".into(), rows.fingerprint()));
        Ok(rows.train)
    }
}

fn reader<'r>(
    common: &Common,
    data: &'r DataSettings,
    prompts: &'r PromptsSettings,
    model: &'r Checkpoint,
) -> RowReader<'r> {
    RowReader::new(data, prompts, common.evaluation.every_steps > 0, &model.text, &model.architecture)
}

/// A model as it is held where it is only read.
fn frozen(common: &Common, model: &Arc<Checkpoint>) -> Result<Arc<Checkpoint>> {
    match common.model.dtype.dtype() {
        DType::F32 => Ok(model.clone()),
        dtype => Ok(Arc::new(model.rounded(dtype)?)),
    }
}

/// A model under a score head; one that has a score head is shared.
fn scored(common: &Common, model: &Arc<Checkpoint>) -> Result<Arc<Checkpoint>> {
    match model.architecture.head {
        HeadKind::Score => Ok(model.clone()),
        HeadKind::Language => Ok(Arc::new(model.rounded(DType::F32)?.with_score_head(common.job.seed)?)),
    }
}
