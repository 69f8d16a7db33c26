//! Who takes part in a job: the roles that its algorithm needs, and whatever knows better than the model.

use std::fs;
use std::sync::Arc;

use rehearsal_actors::{ArchivistHandle, Devices, Director, Reward, RewardError, RewardModel, RewardModels};
use rehearsal_lm::Checkpoint;
use rehearsal_store::{KeptReply, Usage};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::config::judges::{JudgeSource, PeopleConfig};
use crate::config::methods::Algorithm;
use crate::encoder::EncoderReward;
use crate::error::{At, Error, Result};
use crate::inputs::Inputs;
use crate::judge::{ApiJudge, HttpScorer, Judge, JudgeReward, LocalJudge, ReplyCache, ReplyFormat, Template};
use crate::label::people::CachedLabels;
use crate::label::{self, Access, LabelQueue, LabelServer, LabelService, PeopleReward};
use crate::rules::WeightedReward;
use crate::run::Roles;

/// Starts the roles that an algorithm needs.
pub(crate) async fn start(
    config: &Config,
    inputs: &Inputs,
    reward: Option<Arc<dyn Reward>>,
    director: Director,
    archivist: ArchivistHandle,
    devices: Devices,
    stop: &CancellationToken,
) -> Result<Roles> {
    let algorithm = config.job.algorithm;
    let trained = |placement| config.trained(placement);
    let mut roles = Roles {
        director,
        archivist,
        policy: None,
        reference: None,
        reward: None,
        critic: None,
        buffer: None,
        page: None,
    };
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
        if let (Some(settings), Some(judge)) = (&config.judge, judge(config, inputs, &devices, &roles.archivist, stop)?)
        {
            parts.push((settings.weight, Arc::new(judge)));
        }
        if let Some(scorer) = &config.scorer {
            let http = HttpScorer::new(scorer.endpoint.clone(), scorer.batch, stop.clone()).map_err(Error::Rules)?;
            parts.push((scorer.weight, Arc::new(http)));
        }
        if let (Some(settings), Some(encoder)) = (&config.encoder, &inputs.encoder) {
            parts.push((settings.weight, Arc::new(EncoderReward::new(encoder.clone(), devices.clone()))));
        }
        if let Some(settings) = &config.people {
            let (people, page) = people(settings, &roles.archivist, stop).await?;
            parts.push((settings.weight, Arc::new(people)));
            roles.page = Some(page);
        }
        let limits = &config.limits;
        roles.reward = Some(director.reward(Arc::new(WeightedReward::new(parts))).await?);
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
    stop: &CancellationToken,
) -> Result<Option<JudgeReward>> {
    let Some(settings) = &config.judge else { return Ok(None) };
    let own = settings.template_file.as_ref().map(|file| fs::read_to_string(file).at(file)).transpose()?;
    let form = match &settings.source {
        JudgeSource::Local(_) => ReplyFormat::Token,
        JudgeSource::Api { settings, .. } if settings.structured => ReplyFormat::Json,
        JudgeSource::Api { .. } => ReplyFormat::Text,
    };
    let template = Template::new(&settings.template, own, form).map_err(Error::Rules)?;
    let judge: Box<dyn Judge> = match (&settings.source, &inputs.judge) {
        (JudgeSource::Api { settings, endpoint }, _) => {
            Box::new(ApiJudge::new(settings.clone(), endpoint.clone(), stop.clone()).map_err(Error::Rules)?)
        }
        (JudgeSource::Local(_), Some(model)) => {
            let (placement, dtype) = (config.placement.reward, config.model.dtype);
            Box::new(LocalJudge::new(model.clone(), placement, dtype, devices).map_err(Error::Rules)?)
        }
        (JudgeSource::Local(_), None) => return Ok(None),
    };
    let memory = StoreMemory { archivist: archivist.clone(), runtime: tokio::runtime::Handle::current() };
    let memory: Arc<dyn ReplyCache> = Arc::new(memory);
    Ok(Some(JudgeReward::new(judge, template, settings.mode, Some(memory), settings.budget)))
}

/// People, the page for them, and where it is.
async fn people(
    settings: &PeopleConfig,
    archivist: &ArchivistHandle,
    stop: &CancellationToken,
) -> Result<(PeopleReward, (LabelServer, String))> {
    let memory: Arc<dyn ReplyCache> =
        Arc::new(StoreMemory { archivist: archivist.clone(), runtime: tokio::runtime::Handle::current() });
    let service = LabelService::new(LabelQueue::new(settings.labels), Box::new(CachedLabels(memory.clone())));
    let service = Arc::new(service);
    let access = Access::from_env(settings.listen, settings.token_env.as_deref())?;
    let served = label::serve(service.clone(), settings.listen, access.clone(), true).await?;
    let url = access.url(served.address);
    Ok((PeopleReward::new(service, memory, stop.clone()), (served, url)))
}

/// A judge's memory in the job's store. The reward's thread is not one of the host's, so it may wait for the archivist.
struct StoreMemory {
    archivist: ArchivistHandle,
    runtime: tokio::runtime::Handle,
}

impl ReplyCache for StoreMemory {
    fn recall(&self, keys: &[String]) -> std::result::Result<Vec<Option<KeptReply>>, RewardError> {
        self.runtime.block_on(self.archivist.recall(keys.to_vec())).map_err(lost)
    }

    fn remember(&self, entries: Vec<(String, KeptReply)>, spent: Usage) -> std::result::Result<(), RewardError> {
        self.runtime.block_on(self.archivist.remember(entries, spent)).map_err(lost)
    }

    fn spent(&self) -> std::result::Result<Usage, RewardError> {
        self.runtime.block_on(self.archivist.spent()).map_err(lost)
    }
}

fn lost(e: rehearsal_actors::Error) -> RewardError {
    RewardError::Failed { name: "the judge's memory".into(), row: 0, reason: e.to_string() }
}
