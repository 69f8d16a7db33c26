//! A model of one's own as judge: the probabilities of its verdict tokens (OAIF, RLAIF).

use std::sync::Arc;

use rehearsal_actors::{Devices, FrozenModel, Placement, RewardError};
use rehearsal_lm::{Checkpoint, Message, Text};

use super::foreign::Foreign;
use super::{Judge, Question, QuestionKind, Reply, Usage, understand};

/// A language model that is only asked what comes next.
pub(super) trait Brain: Send + Sync {
    /// A hash of its weights.
    fn fingerprint(&self) -> Result<String, String>;

    fn text(&self) -> &Text;

    /// Tokens of a question and its reply at most.
    fn context(&self) -> usize;

    /// Log-probabilities of tokens that may come next.
    fn next(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>, String>;
}

/// A model of this program's own kinds, on one of the job's devices.
struct Ours {
    checkpoint: Arc<Checkpoint>,
    model: FrozenModel,
}

impl Brain for Ours {
    fn fingerprint(&self) -> Result<String, String> {
        self.checkpoint.fingerprint().map_err(|e| e.to_string())
    }

    fn text(&self) -> &Text {
        &self.checkpoint.text
    }

    fn context(&self) -> usize {
        self.checkpoint.architecture.context
    }

    fn next(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>, String> {
        self.model.next_token_logprobs(prompt, candidates).map_err(|e| e.to_string())
    }
}

/// What a local judge is made of.
#[derive(Clone)]
pub enum JudgeModel {
    Ours(Arc<Checkpoint>),
    /// Of an architecture that this program does not train.
    Foreign(Arc<Foreign>),
}

impl JudgeModel {
    /// A hash of its weights.
    pub fn fingerprint(&self) -> Result<String, String> {
        match self {
            Self::Ours(checkpoint) => checkpoint.fingerprint().map_err(|e| e.to_string()),
            Self::Foreign(model) => model.fingerprint(),
        }
    }
}

/// A frozen language model that is asked for one token.
pub struct LocalJudge {
    id: String,
    brain: Arc<dyn Brain>,
    placement: Placement,
    /// The tokens `1` to `9`.
    digits: Vec<u32>,
}

impl LocalJudge {
    /// A model as judge. Its tokenizer must have a token for each digit. Placement and type are those of a model of our
    /// own; any other computes in f32 on the CPU.
    pub fn new(
        model: JudgeModel,
        placement: Placement,
        dtype: rehearsal_lm::Precision,
        devices: &Devices,
    ) -> Result<Self, String> {
        let placement = if matches!(model, JudgeModel::Foreign(_)) { Placement::Cpu } else { placement };
        let brain: Arc<dyn Brain> = match model {
            JudgeModel::Ours(checkpoint) => {
                let model = FrozenModel::new(&checkpoint, placement, dtype, devices).map_err(|e| e.to_string())?;
                Arc::new(Ours { checkpoint, model })
            }
            JudgeModel::Foreign(model) => model,
        };
        let digit = |d: u32| match brain.text().encode_plain(&d.to_string()) {
            Ok(tokens) if tokens.len() == 1 => Ok(tokens[0]),
            _ => Err(format!("the judge's tokenizer has no token for `{d}`")),
        };
        let digits = (1..=9).map(digit).collect::<Result<_, _>>()?;
        Ok(Self { id: format!("local {}", brain.fingerprint()?), brain, placement, digits })
    }

    fn reply(&self, question: &Question) -> Result<Reply, String> {
        let (system, user) = (Message::system(&question.system), Message::user(&question.text));
        let messages = if question.system.is_empty() { vec![user] } else { vec![system, user] };
        let text = self.brain.text();
        // A template without room for a system message gets it in front of the question.
        let prompt = text
            .encode_chat(&messages)
            .or_else(|_| text.encode_chat(&[Message::user(format!("{}\n\n{}", question.system, question.text))]));
        let prompt = prompt.map_err(|e| e.to_string())?;
        let context = self.brain.context();
        if prompt.len() >= context {
            let raw = format!("too long for the judge: {} tokens, and its context is {context}", prompt.len());
            return Ok(Reply { raw, verdict: None, usage: Usage::default() });
        }
        let usage = Usage { calls: 1, input_tokens: prompt.len() as u64, output_tokens: 1, money: 0.0 };
        let raw = match question.kind {
            QuestionKind::Pair => {
                let said = self.brain.next(&prompt, &self.digits[..2])?;
                // Between the two tokens alone, whatever else the model would rather say.
                format!("p(1) = {}", 1.0 / (1.0 + f64::from(said[1] - said[0]).exp()))
            }
            QuestionKind::Grade => {
                let said = self.brain.next(&prompt, &self.digits).map_err(|e| e.to_string())?;
                let weights: Vec<f64> = said.iter().map(|l| f64::from(*l).exp()).collect();
                let mean = weights.iter().zip(1..).map(|(w, d)| w * f64::from(d)).sum::<f64>();
                format!("grade = {}", mean / weights.iter().sum::<f64>())
            }
            QuestionKind::Ranking(answers) => {
                let digits = self.digits.get(..answers);
                let digits =
                    digits.ok_or_else(|| format!("a local judge ranks 9 answers at most, and has {answers}"))?;
                let said = self.brain.next(&prompt, digits).map_err(|e| e.to_string())?;
                let weights: Vec<f64> = said.iter().map(|l| f64::from(*l).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let shares: Vec<String> = weights.iter().map(|w| (w / sum).to_string()).collect();
                format!("p(best) = {}", shares.join(" "))
            }
        };
        Ok(Reply { verdict: understand(question.kind, &raw), raw, usage })
    }
}

impl Judge for LocalJudge {
    fn id(&self) -> &str {
        &self.id
    }

    fn occupies(&self) -> Vec<Placement> {
        vec![self.placement]
    }

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        let failed = |reason: String| RewardError::Failed { name: self.id.clone(), row: 0, reason };
        questions.iter().map(|q| self.reply(q).map_err(failed)).collect()
    }
}
