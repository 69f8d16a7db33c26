//! Trained reward models as a source of rewards: `reward.models`.

use std::sync::Arc;

use rehearsal_actors::{Reading, RewardModel, RewardModels};
use rehearsal_learn::reward::Ensemble;
use rehearsal_lm::Checkpoint;

use super::source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
use crate::blocking::blocking;
use crate::config::{Keys, ModelSource, Range, Settings};
use crate::error::Result;
use crate::futures::BoxFuture;

/// The keys of `[reward]` that name trained models.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardModelSource {
    /// Trained models; empty for none.
    pub models: Vec<ModelSource>,
    /// Weight of their score beside other sources.
    pub weight: f64,
    /// How the scores of several models become one.
    pub ensemble: Ensemble,
    /// Scores are clipped to plus or minus this.
    pub clip: Option<f64>,
}

impl Default for RewardModelSource {
    fn default() -> Self {
        Self { models: Vec::new(), weight: 1.0, ensemble: Ensemble::Mean, clip: None }
    }
}

impl Settings for RewardModelSource {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("reward");
        // A chain's reward model is what its policy is trained on, unless the stage names another reward.
        let named = s.has_items("rules") || s.has("models");
        if let (Some(model), true, false) = (s.earlier().reward_model.clone(), self.models.is_empty(), named) {
            self.models.push(ModelSource::Path(model));
        }
        let help =
            "Trained reward models (Hugging Face directories with a `score` head): their score is part of the reward.";
        s.models("models", &mut self.models, "a list of paths", help);
        s.number("model_weight", &mut self.weight, Range::any(), "Weight of the reward models beside other sources.");
        let mut penalty = if let Ensemble::Penalised(penalty) = self.ensemble { penalty } else { 1.0 };
        let help = "`penalised`: the variance is subtracted this many times.";
        s.number("ensemble_penalty", &mut penalty, Range::from(0.0), help);
        if let Ensemble::Penalised(own) = &mut self.ensemble {
            *own = penalty;
        }
        s.choice(
            "ensemble",
            &mut self.ensemble,
            &[("mean", Ensemble::Mean), ("min", Ensemble::Min), ("penalised", Ensemble::Penalised(penalty))],
            "How the scores of several reward models become one.",
        );
        let help = "Scores of reward models are clipped to plus or minus this; 0 leaves them.";
        s.number_or_none("model_clip", &mut self.clip, Range::from(0.0), help);
    }
}

impl RewardSource for RewardModelSource {
    fn name(&self) -> &'static str {
        "reward.models"
    }

    fn is_configured(&self) -> bool {
        !self.models.is_empty()
    }

    fn load(&self, inputs: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        let mut checkpoints = Vec::new();
        for source in &self.models {
            let model = inputs.models.load(source)?;
            inputs.fingerprint.push(("reward model, its weights".into(), model.fingerprint()?));
            inputs.reward_models.push(model.clone());
            checkpoints.push(model);
        }
        let tokenizer = inputs.policy.text.tokenizer_json().to_string();
        Ok(Box::new(Loaded { settings: self.clone(), checkpoints, tokenizer }))
    }
}

struct Loaded {
    settings: RewardModelSource,
    checkpoints: Vec<Arc<Checkpoint>>,
    /// The policy's tokenizer: a model with another reads the text of a conversation.
    tokenizer: String,
}

impl LoadedReward for Loaded {
    fn start<'a>(self: Box<Self>, context: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>> {
        Box::pin(async move {
            let (devices, placement, dtype) = (context.devices.clone(), context.placement, context.dtype);
            let tokens = context.micro_batch_tokens;
            let reading = if context.results < 2 { Reading::WholeText } else { Reading::AsTrained };
            let Loaded { settings, checkpoints, tokenizer } = *self;
            let members = blocking(move || {
                let one = |checkpoint: &Arc<Checkpoint>| {
                    RewardModel::new("reward model", checkpoint, &tokenizer, placement, dtype, tokens, &devices)
                        .map(|model| model.with_reading(reading))
                };
                checkpoints.iter().map(one).collect::<std::result::Result<Vec<_>, _>>()
            });
            let members = members.await?;
            let RewardModelSource { weight, ensemble, clip, .. } = settings;
            Ok(StartedReward::new(weight, RewardModels { members, ensemble, clip }))
        })
    }
}
