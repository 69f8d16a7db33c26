//! A local model as judge: the probabilities of its verdict tokens after the question (OAIF, RLAIF).

use std::sync::Arc;

use rehearsal_actors::{Devices, FrozenModel, Placement, RewardError};
use rehearsal_lm::{Checkpoint, Message, Precision, Text};
use rehearsal_store::Usage;

use super::question::{Judge, Question, Reply};
use super::verdict::{JudgeVerdict, QuestionKind, parse_probabilities};
use crate::transformers::CausalModel;

/// A language model that gives log-probabilities of the next token.
trait NextTokenModel: Send + Sync {
    /// Tokenizer and chat template.
    fn text(&self) -> &Text;

    /// Longest sequence in tokens.
    fn context(&self) -> usize;

    /// Log-probabilities of each of `candidates` as the token after `prompt`.
    fn next_token_logprobs(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>, String>;
}

/// A model of the `lm` crate on one of the job's devices.
struct NativeModel {
    checkpoint: Arc<Checkpoint>,
    model: FrozenModel,
}

impl NextTokenModel for NativeModel {
    fn text(&self) -> &Text {
        &self.checkpoint.text
    }

    fn context(&self) -> usize {
        self.checkpoint.architecture.context
    }

    fn next_token_logprobs(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>, String> {
        self.model.next_token_logprobs(prompt, candidates).map_err(|e| e.to_string())
    }
}

/// A candle-transformers model on the CPU, with the job's thread pool.
struct TransformersModel {
    model: Arc<CausalModel>,
    devices: Devices,
}

impl NextTokenModel for TransformersModel {
    fn text(&self) -> &Text {
        self.model.text()
    }

    fn context(&self) -> usize {
        self.model.context()
    }

    fn next_token_logprobs(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>, String> {
        self.model.next_token_logprobs(prompt, candidates, &self.devices)
    }
}

/// A language model that has been read and can be a [`LocalJudge`].
#[derive(Clone)]
pub enum JudgeModel {
    /// Of an architecture of the `lm` crate.
    Native(Arc<Checkpoint>),
    /// Of an architecture of candle-transformers.
    Transformers(Arc<CausalModel>),
}

impl JudgeModel {
    /// Hash of the weights.
    pub fn fingerprint(&self) -> Result<String, String> {
        match self {
            Self::Native(checkpoint) => checkpoint.fingerprint().map_err(|e| e.to_string()),
            Self::Transformers(model) => Ok(model.fingerprint().into()),
        }
    }
}

/// A frozen language model as judge. A reply is one token, whose probabilities are the verdict.
pub struct LocalJudge {
    id: String,
    model: Arc<dyn NextTokenModel>,
    placement: Placement,
    /// Token ids of `1` to `9`.
    digits: Vec<u32>,
}

impl LocalJudge {
    /// Places a model. `placement` and `dtype` apply to [`JudgeModel::Native`]; a candle-transformers model stays on
    /// the CPU.
    ///
    /// Fails if the tokenizer has no single token for each of the digits 1 to 9.
    pub fn new(model: JudgeModel, placement: Placement, dtype: Precision, devices: &Devices) -> Result<Self, String> {
        let id = format!("local {}", model.fingerprint()?);
        let (model, placement): (Arc<dyn NextTokenModel>, Placement) = match model {
            JudgeModel::Native(checkpoint) => {
                let model = FrozenModel::new(&checkpoint, placement, dtype, devices).map_err(|e| e.to_string())?;
                (Arc::new(NativeModel { checkpoint, model }), placement)
            }
            JudgeModel::Transformers(model) => {
                (Arc::new(TransformersModel { model, devices: devices.clone() }), Placement::Cpu)
            }
        };
        let digit = |d: u32| match model.text().encode_plain(&d.to_string()) {
            Ok(tokens) if tokens.len() == 1 => Ok(tokens[0]),
            _ => Err(format!("the judge's tokenizer has no single token for `{d}`; choose another model")),
        };
        let digits = (1..=9).map(digit).collect::<Result<_, _>>()?;
        Ok(Self { id, model, placement, digits })
    }

    fn reply(&self, question: &Question) -> Result<Reply, String> {
        let text = self.model.text();
        // Whatever the template quotes stays text: a special token that is written out in it is broken up.
        let question = Question { text: text.without_special(&question.text), ..question.clone() };
        let (system, user) = (Message::system(&question.system), Message::user(&question.text));
        let messages = if question.system.is_empty() { vec![user] } else { vec![system, user] };
        // A chat template that refuses a system message gets it as the beginning of the user message.
        let prompt = text
            .encode_chat(&messages)
            .or_else(|_| text.encode_chat(&[Message::user(format!("{}\n\n{}", question.system, question.text))]));
        let prompt = prompt.map_err(|e| e.to_string())?;
        let context = self.model.context();
        if prompt.len() >= context {
            let raw = format!("too long for the judge: {} tokens, and its context is {context}", prompt.len());
            return Ok(Reply { raw, verdict: None, usage: Usage::default() });
        }
        let usage = Usage { calls: 1, input_tokens: prompt.len() as u64, output_tokens: 1, money: 0.0 };
        let raw = match question.kind {
            QuestionKind::Pair => {
                let logprobs = self.model.next_token_logprobs(&prompt, &self.digits[..2])?;
                // Normalised over the two verdict tokens alone.
                format!("p(1) = {}", 1.0 / (1.0 + f64::from(logprobs[1] - logprobs[0]).exp()))
            }
            QuestionKind::Grade => {
                let weights = self.probabilities(&prompt, &self.digits)?;
                let mean = weights.iter().zip(1..).map(|(w, d)| w * f64::from(d)).sum::<f64>();
                format!("grade = {}", mean / weights.iter().sum::<f64>())
            }
            QuestionKind::Ranking(answers) => {
                let digits = self.digits.get(..answers);
                let digits =
                    digits.ok_or_else(|| format!("a local judge can rank 9 completions at most, not {answers}"))?;
                let weights = self.probabilities(&prompt, digits)?;
                let sum: f64 = weights.iter().sum();
                let shares: Vec<String> = weights.iter().map(|w| (w / sum).to_string()).collect();
                format!("p(best) = {}", shares.join(" "))
            }
        };
        Ok(Reply { verdict: self.verdict(question.kind, &raw), raw, usage })
    }

    /// Probabilities of `candidates` as the next token, over the whole vocabulary.
    fn probabilities(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f64>, String> {
        let logprobs = self.model.next_token_logprobs(prompt, candidates)?;
        Ok(logprobs.iter().map(|l| f64::from(*l).exp()).collect())
    }
}

impl Judge for LocalJudge {
    fn id(&self) -> &str {
        &self.id
    }

    fn placements(&self) -> Vec<Placement> {
        vec![self.placement]
    }

    fn verdict(&self, kind: QuestionKind, raw: &str) -> Option<JudgeVerdict> {
        parse_probabilities(kind, raw)
    }

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        let failed = |reason: String| RewardError::Failed { name: self.id.clone(), row: 0, reason };
        questions.iter().map(|q| self.reply(q).map_err(failed)).collect()
    }
}
