//! A BERT model as a source of rewards: `[encoder]`. A sequence classifier scores the pair of prompt and completion; a
//! sentence encoder scores the similarity of the completion to the reference answer of the prompt's row.

use std::path::PathBuf;
use std::sync::Arc;

use rehearsal_actors::{Devices, Judged, Placement, Reward, RewardError, Sample};

use super::source::{LoadedReward, RewardContext, RewardInputs, RewardSource, StartedReward};
use crate::config::{Keys, Range, Settings};
use crate::error::{Error, Result};
use crate::features::ENCODERS;
use crate::futures::BoxFuture;
use crate::transformers::BertEncoder;

/// `[encoder]`
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderSource {
    /// Hugging Face directory of a BERT; `None` for no encoder.
    pub model: Option<PathBuf>,
    /// Weight of its score beside other sources.
    pub weight: f64,
}

impl Default for EncoderSource {
    fn default() -> Self {
        Self { model: None, weight: 1.0 }
    }
}

impl Settings for EncoderSource {
    fn visit(&mut self, keys: &mut Keys) {
        let mut s = keys.section("encoder");
        s.path(
            "model",
            &mut self.model,
            "A BERT in Hugging Face's format. One for sequence classification scores prompt and completion by its logit (of \
             two labels, by the log odds of the second). Any other, such as MiniLM, scores the cosine similarity of the \
             completion and the prompt's reference answer.",
        );
        if self.model.is_some() {
            s.requires("model", ENCODERS.enabled, ENCODERS);
        }
        s.number("weight", &mut self.weight, Range::any(), "Weight of its score beside other sources.");
    }
}

impl RewardSource for EncoderSource {
    fn name(&self) -> &'static str {
        "encoder"
    }

    fn is_configured(&self) -> bool {
        self.model.is_some()
    }

    fn load(&self, inputs: &mut RewardInputs<'_>) -> Result<Box<dyn LoadedReward>> {
        let model = self
            .model
            .as_ref()
            .ok_or_else(|| Error::RewardSource { name: "encoder", reason: "`encoder.model` is missing".into() })?;
        let encoder = Arc::new(BertEncoder::open(model).map_err(Error::Usage)?);
        inputs.fingerprint.push(("encoder, its weights".into(), encoder.name().into()));
        Ok(Box::new(Loaded { encoder, weight: self.weight }))
    }
}

struct Loaded {
    encoder: Arc<BertEncoder>,
    weight: f64,
}

impl LoadedReward for Loaded {
    fn start<'a>(self: Box<Self>, context: &'a RewardContext) -> BoxFuture<'a, Result<StartedReward>> {
        let Loaded { encoder, weight } = *self;
        let reward = EncoderReward::new(encoder, context.devices.clone());
        Box::pin(async move { Ok(StartedReward::new(weight, reward)) })
    }
}

/// Scores completions with a [`BertEncoder`].
///
/// A classifier's score is its logit (of two labels, the log odds of the second). A sentence encoder's score is the
/// cosine of the embeddings of completion and reference answer, from -1 to 1; a row without a reference answer is an
/// error.
pub struct EncoderReward {
    encoder: Arc<BertEncoder>,
    devices: Devices,
}

impl EncoderReward {
    /// Forward passes run on the thread pool of `devices`.
    pub fn new(encoder: Arc<BertEncoder>, devices: Devices) -> Self {
        Self { encoder, devices }
    }

    fn score_one(&self, sample: &Sample) -> std::result::Result<f64, String> {
        if self.encoder.is_classifier() {
            return self.encoder.classify(&sample.prompt, &sample.completion, &self.devices);
        }
        let reference = sample.answer.as_deref().ok_or("the prompt's row has no reference answer to compare with")?;
        let embedding = |text: &str| self.encoder.embedding(text, &self.devices);
        Ok(cosine(&embedding(&sample.completion)?, &embedding(reference)?))
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()).max(f64::MIN_POSITIVE)
}

impl Reward for EncoderReward {
    fn name(&self) -> &str {
        self.encoder.name()
    }

    fn placements(&self) -> Vec<Placement> {
        vec![Placement::Cpu]
    }

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        let failed = |s: &Sample, reason| RewardError::Failed { name: self.name().into(), row: s.row, reason };
        samples.iter().map(|s| self.score_one(s).map(Judged::from).map_err(|reason| failed(s, reason))).collect()
    }
}
