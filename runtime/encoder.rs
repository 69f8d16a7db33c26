//! Encoders of the BERT family as scorers, through candle-transformers: a classifier's opinion of an answer, or the
//! likeness of an answer to the prompt's reference answer (MiniLM and other sentence encoders).

use std::path::Path;

use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::{Linear, Module, VarBuilder};
use candle_transformers::models::bert::{BertModel, Config as BertConfig};
use rehearsal_actors::{Judged, Placement, Reward, RewardError, Sample};
use serde_json::Value;
use tokenizers::{Tokenizer, TruncationParams};

use crate::error::{At, Error, Result};

/// An encoder with what makes a score of it.
pub struct Encoder {
    name: String,
    bert: BertModel,
    head: Head,
    tokenizer: Tokenizer,
}

enum Head {
    /// Cosine of the mean-pooled last hidden states of answer and reference (Reimers and Gurevych 2019, §3), from -1 to 1.
    Similarity,
    /// The logit of a single label; of two, the second's less the first's, which is the log odds of the second.
    Classifier { pooler: Linear, classifier: Linear },
}

impl Encoder {
    /// A Hugging Face directory with `config.json`, `tokenizer.json` and `model.safetensors`. One whose architecture is
    /// `BertForSequenceClassification` classifies the pair of prompt and answer; any other encodes.
    pub fn open(directory: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::Usage(format!("the encoder in {}: {reason}", directory.display()));
        let path = directory.join("config.json");
        let text = std::fs::read_to_string(&path).at(&path)?;
        let whole: Value = serde_json::from_str(&text).map_err(|e| wrong(format!("config.json: {e}")))?;
        if whole["model_type"] != "bert" {
            return Err(wrong(format!("its `model_type` is {}; only \"bert\" can be read", whole["model_type"])));
        }
        let config: BertConfig = serde_json::from_str(&text).map_err(|e| wrong(format!("config.json: {e}")))?;
        let mut tokenizer = Tokenizer::from_file(directory.join("tokenizer.json")).map_err(|e| wrong(e.to_string()))?;
        let truncation = TruncationParams { max_length: config.max_position_embeddings, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| wrong(e.to_string()))?;
        tokenizer.with_padding(None);
        let path = directory.join("model.safetensors");
        let failed = |e: candle_core::Error| wrong(e.to_string());
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).map_err(failed)?;
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let classifies = whole["architectures"][0] == "BertForSequenceClassification";
        let head = if classifies {
            let hidden = config.hidden_size;
            let pooler = candle_nn::linear(hidden, hidden, vb.pp("bert.pooler.dense")).map_err(failed)?;
            let weight = vb.pp("classifier").get_unchecked("weight").map_err(failed)?;
            let labels = weight.dim(0).map_err(failed)?;
            if labels > 2 {
                return Err(wrong(format!("it has {labels} labels; a score is made of one or two")));
            }
            let classifier = candle_nn::linear(hidden, labels, vb.pp("classifier")).map_err(failed)?;
            Head::Classifier { pooler, classifier }
        } else {
            Head::Similarity
        };
        let bert = BertModel::load(if classifies { vb.pp("bert") } else { vb }, &config).map_err(failed)?;
        let kind = if classifies { "classifier" } else { "similarity" };
        let weights = std::fs::read(&path).at(&path)?;
        let name = format!("{kind} {}", &blake3::hash(&weights).to_hex()[..16]);
        Ok(Self { name, bert, head, tokenizer })
    }

    /// Last hidden states of a text or of a pair of texts: tokens x hidden.
    fn states(&self, text: &str, other: Option<&str>) -> std::result::Result<Tensor, String> {
        let encoding = match other {
            Some(other) => self.tokenizer.encode((text, other), true),
            None => self.tokenizer.encode(text, true),
        };
        let encoding = encoding.map_err(|e| e.to_string())?;
        let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
        let run = || -> candle_core::Result<Tensor> {
            self.bert.forward(&row(encoding.get_ids())?, &row(encoding.get_type_ids())?, None)?.i(0)
        };
        run().map_err(|e| e.to_string())
    }

    fn one(&self, sample: &Sample) -> std::result::Result<f64, String> {
        match &self.head {
            Head::Similarity => {
                let reference =
                    sample.answer.as_deref().ok_or("the prompt's row has no reference answer to compare with")?;
                let mean = |text: &str| {
                    let states = self.states(text, None)?;
                    states.mean(0).and_then(|m| m.to_vec1::<f32>()).map_err(|e| e.to_string())
                };
                Ok(cosine(&mean(&sample.completion)?, &mean(reference)?))
            }
            Head::Classifier { pooler, classifier } => {
                let states = self.states(&sample.prompt, Some(&sample.completion))?;
                let run = || -> candle_core::Result<Vec<f32>> {
                    let first = pooler.forward(&states.i(..1)?)?.tanh()?;
                    classifier.forward(&first)?.i(0)?.to_vec1()
                };
                match run().map_err(|e| e.to_string())?.as_slice() {
                    [score] => Ok(f64::from(*score)),
                    [no, yes] => Ok(f64::from(*yes) - f64::from(*no)),
                    _ => Err("the classifier has no labels".into()),
                }
            }
        }
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt()).max(f64::MIN_POSITIVE)
}

impl Reward for Encoder {
    fn name(&self) -> &str {
        &self.name
    }

    fn placements(&self) -> Vec<Placement> {
        vec![Placement::Cpu]
    }

    fn score(&self, samples: &[Sample]) -> std::result::Result<Vec<Judged>, RewardError> {
        let failed = |s: &Sample, reason| RewardError::Failed { name: self.name.clone(), row: s.row, reason };
        samples.iter().map(|s| self.one(s).map(Judged::from).map_err(|reason| failed(s, reason))).collect()
    }
}
