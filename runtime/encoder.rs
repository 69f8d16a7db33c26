//! `[encoder]`: a BERT model as reward. A sequence classifier scores the pair of prompt and completion; a sentence
//! encoder scores the similarity of the completion to the reference answer of the prompt's row.

use std::sync::Arc;

use rehearsal_actors::{Devices, Judged, Placement, Reward, RewardError, Sample};

use crate::transformers::BertEncoder;

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

    fn score_one(&self, sample: &Sample) -> Result<f64, String> {
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

    fn occupies(&self) -> Vec<Placement> {
        vec![Placement::Cpu]
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        let failed = |s: &Sample, reason| RewardError::Failed { name: self.name().into(), row: s.row, reason };
        samples.iter().map(|s| self.score_one(s).map(Judged::from).map_err(|reason| failed(s, reason))).collect()
    }
}
