//! Trained reward models as a reward: one, or an ensemble.

use std::path::Path;
use std::sync::Arc;

use rehearsal_learn::reward::{Ensemble, Normalisation};
use rehearsal_lm::{Checkpoint, Decoder, HeadKind, Message, Precision, Text};
use serde_json::Value;

use crate::device::Seat;
use crate::{Devices, Error, Judged, Placement, Result, Reward, RewardError, Sample, Tokens, passes};

/// Key of `config.json` under which a reward model's normalisation is kept.
pub const NORMALISATION_KEY: &str = "reward_normalisation";

/// A frozen model with a score head. It reads prompt and completion as the policy's tokens where both have one tokenizer, else
/// as text in its own words: through its chat template as an answered conversation, or, without one, end to end.
pub struct RewardModel {
    name: String,
    decoder: Decoder,
    seat: Seat,
    micro_batch_tokens: usize,
    normalisation: Normalisation,
    /// Its own tokenizer, where that is not the policy's.
    text: Option<Text>,
}

impl RewardModel {
    /// A checkpoint as a reward. `tokenizer` is the policy's `tokenizer.json`.
    pub fn new(
        name: impl Into<String>,
        checkpoint: &Checkpoint,
        tokenizer: &str,
        placement: Placement,
        precision: Precision,
        micro_batch_tokens: usize,
        devices: &Devices,
    ) -> Result<Self> {
        let wrong = |reason: &str| Error::Start { role: "reward", reason: reason.into() };
        if checkpoint.architecture.head != HeadKind::Score {
            return Err(wrong("the reward model has no `score` head; train one with `algorithm = \"reward_model\"`"));
        }
        let text = (checkpoint.text.tokenizer_json() != tokenizer).then(|| checkpoint.text.clone());
        let seat = devices.seat(placement)?;
        let decoder = checkpoint.frozen(&seat.device, precision.dtype())?;
        let number = |key: &str| checkpoint.config[NORMALISATION_KEY][key].as_f64();
        let normalisation = Normalisation { mean: number("mean").unwrap_or(0.0), std: number("std").unwrap_or(1.0) };
        Ok(Self { name: name.into(), decoder, seat, micro_batch_tokens, normalisation, text })
    }

    fn scores(&self, samples: &[Sample]) -> Result<Vec<f64>> {
        let tokens = samples.iter().map(|s| self.tokens(s)).collect::<Result<Vec<_>>>()?;
        let raw = self.seat.run(|| passes::scores(&self.decoder, &tokens, self.micro_batch_tokens))?;
        Ok(raw.into_iter().map(|s| self.normalisation.apply(f64::from(s))).collect())
    }
}

impl RewardModel {
    fn tokens(&self, sample: &Sample) -> Result<Tokens> {
        let Some(text) = &self.text else { return Ok(sample.ids.clone()) };
        let whole = match text.template() {
            Some(template) if !sample.messages.is_empty() => {
                let mut messages = (*sample.messages).clone();
                messages.push(Message { role: "assistant".into(), content: sample.completion.clone() });
                text.encode_plain(&template.render(&messages, false)?)?
            }
            _ => text.encode(&format!("{}{}", sample.prompt, sample.completion))?,
        };
        let context = self.decoder.architecture().context;
        if whole.len() > context {
            let reason = format!(
                "an answer of row {} has {} tokens with its prompt in the reward model's words, and its context is {context}; \
                 lower `prompts.tokens_max` or `rollout.max_new_tokens`",
                sample.row,
                whole.len()
            );
            return Err(rehearsal_lm::Error::Config(reason).into());
        }
        Ok(Tokens { prompt: Arc::default(), completion: Arc::new(whole) })
    }
}

/// Several reward models as one reward, clipped.
pub struct RewardModels {
    pub members: Vec<RewardModel>,
    pub ensemble: Ensemble,
    /// Scores are clipped to plus or minus this.
    pub clip: Option<f64>,
}

impl Reward for RewardModels {
    fn name(&self) -> &str {
        self.members.first().map_or("reward model", |m| &m.name)
    }

    fn occupies(&self) -> Vec<Placement> {
        self.members.iter().map(|m| m.seat.placement).collect()
    }

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        let row = samples.first().map_or(0, |s| s.row);
        let failed = |e: Error| RewardError::Failed { name: self.name().into(), row, reason: e.to_string() };
        let all: Vec<Vec<f64>> =
            self.members.iter().map(|m| m.scores(samples).map_err(failed)).collect::<std::result::Result<_, _>>()?;
        let judge = |i: usize| {
            let each: Vec<f64> = all.iter().map(|scores| scores[i]).collect();
            let score = self.ensemble.of(&each);
            let score = self.clip.map_or(score, |clip| score.clamp(-clip, clip));
            let reason = if each.len() > 1 { format!("{each:.3?}") } else { String::new() };
            Judged::new(score, reason)
        };
        Ok((0..samples.len()).map(judge).collect())
    }
}

/// Writes a normalisation into the `config.json` of an exported reward model.
pub fn keep_normalisation(directory: &Path, normalisation: &Normalisation) -> std::io::Result<()> {
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config[NORMALISATION_KEY] = serde_json::json!({"mean": normalisation.mean, "std": normalisation.std});
    std::fs::write(&path, serde_json::to_vec_pretty(&config)?)
}
