//! BERT: sentence embeddings, or the logit of a sequence classifier.

use std::path::Path;

use candle_core::{Device, IndexOp, Tensor};
use candle_nn::{Linear, Module};
use candle_transformers::models::bert::{BertModel, Config};
use rehearsal_actors::Devices;
use tokenizers::{Encoding, Tokenizer, TruncationParams};

use super::cpu::on_cpu;
use super::directory::{Directory, Weights};

/// A BERT model with its tokenizer, on the CPU in f32.
pub struct BertEncoder {
    name: String,
    bert: BertModel,
    classifier: Option<Classifier>,
    tokenizer: Tokenizer,
}

/// Head of `BertForSequenceClassification`.
struct Classifier {
    /// Dense layer and tanh over the first token's hidden state.
    pooler: Linear,
    /// One or two labels.
    labels: Linear,
}

impl BertEncoder {
    /// Reads a Hugging Face directory with `config.json`, `tokenizer.json` and `model.safetensors`.
    ///
    /// A model whose first architecture is `BertForSequenceClassification` is a classifier; any other is a sentence
    /// encoder. Fails if `model_type` is not `bert`, or if a classifier has more than two labels.
    pub fn open(path: &Path) -> Result<Self, String> {
        Self::read(path).map_err(|reason| format!("the encoder in {}: {reason}", path.display()))
    }

    fn read(path: &Path) -> Result<Self, String> {
        let directory = Directory::open(path)?;
        if directory.model_type() != "bert" {
            let found = &directory.config["model_type"];
            return Err(format!("`model_type` is {found}; only \"bert\" is supported"));
        }
        let config: Config = directory.parsed()?;
        let mut tokenizer = Tokenizer::from_file(directory.file("tokenizer.json")).map_err(|e| e.to_string())?;
        let truncation = TruncationParams { max_length: config.max_position_embeddings, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| e.to_string())?;
        tokenizer.with_padding(None);
        let Weights { tensors, fingerprint } = Weights::read(&[directory.file("model.safetensors")])?;
        let failed = |e: candle_core::Error| e.to_string();
        let is_classifier = directory.config["architectures"][0] == "BertForSequenceClassification";
        let (kind, classifier, tensors) = if is_classifier {
            let hidden = config.hidden_size;
            let pooler = candle_nn::linear(hidden, hidden, tensors.pp("bert.pooler.dense")).map_err(failed)?;
            let weight = tensors.pp("classifier").get_unchecked("weight").map_err(failed)?;
            let count = weight.dim(0).map_err(failed)?;
            if count > 2 {
                return Err(format!("the classifier has {count} labels; a score needs one label or two"));
            }
            let labels = candle_nn::linear(hidden, count, tensors.pp("classifier")).map_err(failed)?;
            ("classifier", Some(Classifier { pooler, labels }), tensors.pp("bert"))
        } else {
            ("similarity", None, tensors)
        };
        let bert = BertModel::load(tensors, &config).map_err(failed)?;
        Ok(Self { name: format!("{kind} {fingerprint}"), bert, classifier, tokenizer })
    }

    /// Kind of model and a hash of its weights.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the model has a classification head.
    pub fn is_classifier(&self) -> bool {
        self.classifier.is_some()
    }

    /// Mean of the last hidden states over all tokens of `text`: `[hidden]` (Reimers and Gurevych 2019, §3).
    pub fn embedding(&self, text: &str, devices: &Devices) -> Result<Vec<f32>, String> {
        let encoding = self.tokenizer.encode(text, true).map_err(|e| e.to_string())?;
        on_cpu(devices, || self.hidden_states(&encoding)?.mean(0)?.to_vec1())
    }

    /// Classifier's score of a pair of texts: the logit of a single label, or of two labels the second logit minus the
    /// first (the log odds of the second). Fails if the model is no classifier.
    pub fn classify(&self, text: &str, pair: &str, devices: &Devices) -> Result<f64, String> {
        let Classifier { pooler, labels } = self.classifier.as_ref().ok_or("the encoder has no classification head")?;
        let encoding = self.tokenizer.encode((text, pair), true).map_err(|e| e.to_string())?;
        let logits: Vec<f32> = on_cpu(devices, || {
            let first = pooler.forward(&self.hidden_states(&encoding)?.i(..1)?)?.tanh()?;
            labels.forward(&first)?.i(0)?.to_vec1()
        })?;
        match logits.as_slice() {
            [score] => Ok(f64::from(*score)),
            [no, yes] => Ok(f64::from(*yes) - f64::from(*no)),
            _ => Err("the classifier has no labels".into()),
        }
    }

    /// Last hidden states of one sequence: `[tokens, hidden]`.
    fn hidden_states(&self, encoding: &Encoding) -> candle_core::Result<Tensor> {
        let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
        self.bert.forward(&row(encoding.get_ids())?, &row(encoding.get_type_ids())?, None)?.i(0)
    }
}
