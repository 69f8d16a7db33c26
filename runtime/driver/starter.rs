//! Starts the roles of a job.

use std::any::Any;
use std::sync::Arc;

use rehearsal_actors::{
    BufferHandle, CriticHandle, Devices, Placement, PolicyHandle, ReferenceHandle, Reward, RewardHandle, SamplerConfig,
    SamplerHandle,
};
use rehearsal_lm::Checkpoint;

use super::roles::{Roles, TrainedModel};
use super::rollouts::Schedule;
use crate::error::Result;
use crate::memory::MemoryBudget;
use crate::nodes::{Coordinator, NodesSettings};
use crate::rewards::{HostScores, LoadedReward, RewardContext, StartedReward, WeightedReward};
use crate::settings::Common;

/// Starts roles and notes them for the driver, which checkpoints, restores and watches them.
pub struct Starter<'a> {
    /// The sections that every job has.
    pub common: &'a Common,
    pub(super) roles: &'a mut Roles,
    pub(super) devices: Devices,
    /// The host's reward, if it brings one.
    pub(super) host: Option<HostScores>,
    pub(super) rewards: Vec<Box<dyn LoadedReward>>,
    pub(super) context: RewardContext,
    pub(super) guards: &'a mut Vec<Box<dyn Any + Send + Sync>>,
    pub(super) budget: &'a mut Option<MemoryBudget>,
    /// The model that is trained.
    pub model: Arc<Checkpoint>,
    /// Average length of a prompt in tokens, rounded up.
    pub prompt_tokens: u64,
}

impl Starter<'_> {
    /// The policy. Its weights are part of every checkpoint.
    pub async fn policy(&mut self, model: Arc<Checkpoint>) -> Result<PolicyHandle> {
        let config = self.common.trained(self.common.placement.policy_members());
        let policy = self.roles.director.policy(model, config, self.devices.clone()).await?;
        self.roles.trained.push(TrainedModel::Policy(policy.clone()));
        self.roles.watch("policy", &policy);
        Ok(policy)
    }

    /// A critic on its own device. Its weights are part of every checkpoint.
    pub async fn critic(&mut self, model: Arc<Checkpoint>) -> Result<CriticHandle> {
        self.scored(model, self.common.placement.critic_members()).await
    }

    /// A reward model to train, on the policy's device. Its weights are part of every checkpoint.
    pub async fn reward_model(&mut self, model: Arc<Checkpoint>) -> Result<CriticHandle> {
        self.scored(model, self.common.placement.policy_members()).await
    }

    async fn scored(&mut self, model: Arc<Checkpoint>, placements: Vec<Placement>) -> Result<CriticHandle> {
        let config = self.common.trained(placements);
        let critic = self.roles.director.critic(model, config, self.devices.clone()).await?;
        self.roles.trained.push(TrainedModel::Critic(critic.clone()));
        self.roles.watch("critic", &critic);
        Ok(critic)
    }

    /// The reference.
    pub async fn reference(&mut self, model: Arc<Checkpoint>) -> Result<ReferenceHandle> {
        let (placement, tokens) = (self.common.placement.reference(), self.common.optimizer.micro_batch_tokens);
        let dtype = self.common.model.dtype;
        let reference = self.roles.director.reference(model, placement, tokens, dtype, self.devices.clone()).await?;
        self.roles.reference = Some(reference.clone());
        self.roles.watch("reference", &reference);
        Ok(reference)
    }

    /// The reward: the host's in place of rules, and every configured source.
    pub async fn reward(&mut self) -> Result<RewardHandle> {
        let RewardContext { stop, meters, .. } = &self.context;
        let host = self.host.take().map(|scores| (1.0, scores.reward(stop.clone(), meters.clone())));
        let mut parts: Vec<(f64, Arc<dyn Reward>)> = host.into_iter().collect();
        for source in std::mem::take(&mut self.rewards) {
            let StartedReward { weight, reward, guard } = source.start(&self.context).await?;
            parts.push((weight, reward));
            self.guards.extend(guard);
        }
        let reward = self.roles.director.reward(Arc::new(WeightedReward::new(parts))).await?;
        self.roles.watch("reward", &reward);
        Ok(reward)
    }

    /// The rollout buffer; a prompt has `group_size` completions.
    pub async fn buffer(&mut self, group_size: usize) -> Result<BufferHandle> {
        let limits = &self.common.limits;
        let buffer = self.roles.director.buffer(group_size, limits.rollouts_max, limits.staleness_max).await?;
        self.roles.buffer = Some(buffer.clone());
        self.roles.watch("buffer", &buffer);
        Ok(buffer)
    }

    /// The sampler, which generates ahead of learning, and the device that it shares with other roles, if it does.
    pub(super) async fn sampler(&mut self, model: Arc<Checkpoint>) -> Result<(SamplerHandle, Option<Placement>)> {
        let placement = &self.common.placement;
        let config = SamplerConfig {
            placement: placement.sampler(),
            threads: placement.sampler_threads,
            precision: self.common.model.dtype,
            lora: self.common.lora_init(),
        };
        let occupied = (placement.sampler_threads == 0).then(|| placement.sampler());
        let sampler = self.roles.director.sampler(model, config, self.devices.clone()).await?;
        self.roles.watch("sampler", &sampler);
        Ok((sampler, occupied))
    }

    /// Where other processes join to generate, if the settings say so.
    pub(super) fn nodes(&mut self, settings: &NodesSettings, model: &Checkpoint) -> Result<Option<Arc<Coordinator>>> {
        let generates_by = (self.common.model.dtype, self.common.lora_init());
        let (events, waits) = (self.context.events.clone(), self.roles.director.waits());
        let patience = self.common.limits.request;
        let nodes = Coordinator::start(settings, model, generates_by, events, waits, patience)?.map(Arc::new);
        self.roles.nodes.clone_from(&nodes);
        Ok(nodes)
    }

    /// The schedule of generation `steps` steps ahead of learning, which checkpoints hold the weights of.
    pub(super) fn schedule(&mut self, steps: u64) -> Arc<Schedule> {
        let schedule = Arc::new(Schedule::new(steps));
        self.roles.schedule = Some(schedule.clone());
        schedule
    }

    /// Notes where the job's memory should go.
    pub fn expect_memory(&mut self, budget: Option<MemoryBudget>) {
        *self.budget = budget;
    }
}
