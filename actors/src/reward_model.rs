//! Trained reward models as a reward: a single model or an ensemble.

use std::path::Path;
use std::sync::Arc;

use rehearsal_learn::reward::{Ensemble, Normalisation};
use rehearsal_lm::generate::Finish;
use rehearsal_lm::{Checkpoint, Decoder, HeadKind, Message, Precision, Text};
use serde_json::Value;

use crate::device::SharedDevice;
use crate::{Devices, Error, Judged, Placement, Result, Reward, RewardError, Sample, Tokens, passes};

/// Key of a reward model's normalisation in its `config.json`.
pub const NORMALISATION_KEY: &str = "reward_normalisation";

/// A frozen model with a score head.
///
/// If its tokenizer is the policy's, it reads the policy's token ids. Otherwise it encodes the text with its own tokenizer, as
/// in its training: the prompt by its chat template if it has one, the completion, and the token that ends a turn if the
/// completion ended by itself. The score is read at the last of them.
pub struct RewardModel {
    name: String,
    decoder: Decoder,
    compute: SharedDevice,
    micro_batch_tokens: usize,
    normalisation: Normalisation,
    /// The model's tokenizer, if it is not the policy's.
    text: Option<Text>,
    /// Token that ends a turn of the assistant.
    end_of_turn: Option<u32>,
    reading: Reading,
}

/// How a reward model with a tokenizer of its own reads a completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reading {
    /// As it was trained.
    #[default]
    AsTrained,
    /// The whole conversation by the chat template, whatever the template prints after the last turn; or prompt and
    /// completion concatenated, without an end. Jobs of version 0.1 were begun with this.
    WholeText,
}

impl RewardModel {
    /// Loads a reward model onto a device. `tokenizer` is the content of the policy's `tokenizer.json`; at most
    /// `micro_batch_tokens` tokens go through the model at once.
    ///
    /// # Errors
    ///
    /// [`Error::Start`] if the checkpoint has no score head or its normalisation is malformed, [`Error::Placement`] if the
    /// device cannot be opened.
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
        let compute = devices.get(placement)?;
        let decoder = checkpoint.frozen(&compute.device, precision.dtype())?;
        let normalisation = normalisation(&checkpoint.config).map_err(|reason| wrong(&reason))?;
        let end_of_turn = checkpoint.text.end_of_turn(&checkpoint.architecture.eos);
        let (name, reading) = (name.into(), Reading::default());
        Ok(Self { name, decoder, compute, micro_batch_tokens, normalisation, text, end_of_turn, reading })
    }

    /// The same model with another reading of texts.
    pub fn with_reading(mut self, reading: Reading) -> Self {
        self.reading = reading;
        self
    }

    fn scores(&self, samples: &[Sample]) -> Result<Vec<f64>> {
        let tokens = samples.iter().map(|s| self.tokens(s)).collect::<Result<Vec<_>>>()?;
        let raw = self.compute.run(|| passes::scores(&self.decoder, &tokens, self.micro_batch_tokens))?;
        Ok(raw.into_iter().map(|s| self.normalisation.apply(f64::from(s))).collect())
    }
}

impl RewardModel {
    fn tokens(&self, sample: &Sample) -> Result<Tokens> {
        let Some(text) = &self.text else { return Ok(sample.ids.clone()) };
        let whole = match self.reading {
            Reading::AsTrained => self.as_trained(text, sample)?,
            Reading::WholeText => whole_text(text, sample)?,
        };
        let context = self.decoder.architecture().context;
        if whole.len() > context {
            let reason = format!(
                "prompt and completion of row {} have {} tokens in the reward model's tokenizer, and its context is {context}; \
                 lower `prompts.tokens_max` or `rollout.max_new_tokens`",
                sample.row,
                whole.len()
            );
            return Err(rehearsal_lm::Error::Config(reason).into());
        }
        Ok(Tokens { prompt: Arc::default(), completion: Arc::new(whole) })
    }

    fn as_trained(&self, text: &Text, sample: &Sample) -> Result<Vec<u32>> {
        let mut whole = match text.template() {
            Some(_) if !sample.messages.is_empty() => text.encode_chat(&sample.messages)?,
            _ => text.encode(&sample.prompt)?,
        };
        whole.extend(text.encode_plain(&sample.completion)?);
        whole.extend(self.end_of_turn.filter(|_| sample.finish == Finish::Eos));
        Ok(whole)
    }
}

fn whole_text(text: &Text, sample: &Sample) -> Result<Vec<u32>> {
    Ok(match text.template() {
        Some(template) if !sample.messages.is_empty() => {
            let mut messages = (*sample.messages).clone();
            messages.push(Message { role: "assistant".into(), content: sample.completion.clone() });
            text.encode_plain(&template.render(&messages, false)?)?
        }
        _ => text.encode(&format!("{}{}", sample.prompt, sample.completion))?,
    })
}

/// An ensemble of reward models as one reward.
pub struct RewardModels {
    /// Models whose scores are combined.
    pub members: Vec<RewardModel>,
    /// How scores are combined.
    pub ensemble: Ensemble,
    /// Scores are clipped to `[-clip, clip]`.
    pub clip: Option<f64>,
}

impl Reward for RewardModels {
    fn name(&self) -> &str {
        self.members.first().map_or("reward model", |m| &m.name)
    }

    fn placements(&self) -> Vec<Placement> {
        self.members.iter().map(|m| m.compute.placement).collect()
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

/// The normalisation in a model's `config.json`: the identity where there is none.
fn normalisation(config: &Value) -> std::result::Result<Normalisation, String> {
    let Some(entry) = config.get(NORMALISATION_KEY) else { return Ok(Normalisation { mean: 0.0, std: 1.0 }) };
    let number = |key: &str| {
        let missing = || format!("`{NORMALISATION_KEY}` of its config.json has no number `{key}`: {entry}");
        entry.get(key).and_then(Value::as_f64).ok_or_else(missing)
    };
    Ok(Normalisation { mean: number("mean")?, std: number("std")? })
}

/// Writes a normalisation into the `config.json` of an exported reward model, in `directory`.
pub fn save_normalisation(directory: &Path, normalisation: &Normalisation) -> std::io::Result<()> {
    let path = directory.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    config[NORMALISATION_KEY] = serde_json::json!({"mean": normalisation.mean, "std": normalisation.std});
    std::fs::write(&path, serde_json::to_vec_pretty(&config)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normalisation_reads_back_and_a_malformed_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "{\"model_type\": \"llama\"}").unwrap();
        let read = || normalisation(&serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap());
        let identity = read().unwrap();
        assert_eq!((identity.mean, identity.std), (0.0, 1.0));
        save_normalisation(folder.path(), &Normalisation { mean: 0.5, std: 2.0 }).unwrap();
        let saved = read().unwrap();
        assert_eq!((saved.mean, saved.std), (0.5, 2.0));
        let error = normalisation(&serde_json::json!({NORMALISATION_KEY: {"mean": 0.5}})).err().unwrap();
        assert!(error.contains("`std`"), "{error}");
    }
}
