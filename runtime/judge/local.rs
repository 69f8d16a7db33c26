//! A model of one's own as judge: the probabilities of its verdict tokens (OAIF, RLAIF).

use std::sync::Arc;

use rehearsal_actors::{Devices, FrozenModel, Placement, RewardError};
use rehearsal_lm::{Checkpoint, Message};

use super::{Judge, Question, QuestionKind, Reply, Usage, understand};

/// A frozen language model that is asked for one token.
pub struct LocalJudge {
    id: String,
    checkpoint: Arc<Checkpoint>,
    model: FrozenModel,
    /// The tokens `1` to `9`.
    digits: Vec<u32>,
}

impl LocalJudge {
    /// A checkpoint as judge. Its tokenizer must have a token for each digit.
    pub fn new(
        checkpoint: Arc<Checkpoint>,
        placement: Placement,
        dtype: rehearsal_lm::Precision,
        devices: &Devices,
    ) -> Result<Self, String> {
        let digit = |d: u32| match checkpoint.text.encode_plain(&d.to_string()) {
            Ok(tokens) if tokens.len() == 1 => Ok(tokens[0]),
            _ => Err(format!("the judge's tokenizer has no token for `{d}`")),
        };
        let digits = (1..=9).map(digit).collect::<Result<_, _>>()?;
        let fingerprint = checkpoint.fingerprint().map_err(|e| e.to_string())?;
        let model = FrozenModel::new(&checkpoint, placement, dtype, devices).map_err(|e| e.to_string())?;
        Ok(Self { id: format!("local {fingerprint}"), checkpoint, model, digits })
    }

    fn reply(&self, question: &Question) -> Result<Reply, String> {
        let (system, user) = (Message::system(&question.system), Message::user(&question.text));
        let messages = if question.system.is_empty() { vec![user] } else { vec![system, user] };
        let text = &self.checkpoint.text;
        // A template without room for a system message gets it in front of the question.
        let prompt = text
            .encode_chat(&messages)
            .or_else(|_| text.encode_chat(&[Message::user(format!("{}\n\n{}", question.system, question.text))]));
        let prompt = prompt.map_err(|e| e.to_string())?;
        let context = self.checkpoint.architecture.context;
        if prompt.len() >= context {
            let raw = format!("too long for the judge: {} tokens, and its context is {context}", prompt.len());
            return Ok(Reply { raw, verdict: None, usage: Usage::default() });
        }
        let usage = Usage { calls: 1, input_tokens: prompt.len() as u64, output_tokens: 1, money: 0.0 };
        let raw = match question.kind {
            QuestionKind::Pair => {
                let said = self.model.next(&prompt, &self.digits[..2]).map_err(|e| e.to_string())?;
                // Between the two tokens alone, whatever else the model would rather say.
                format!("p(1) = {}", 1.0 / (1.0 + f64::from(said[1] - said[0]).exp()))
            }
            QuestionKind::Grade => {
                let said = self.model.next(&prompt, &self.digits).map_err(|e| e.to_string())?;
                let weights: Vec<f64> = said.iter().map(|l| f64::from(*l).exp()).collect();
                let mean = weights.iter().zip(1..).map(|(w, d)| w * f64::from(d)).sum::<f64>();
                format!("grade = {}", mean / weights.iter().sum::<f64>())
            }
            QuestionKind::Ranking(answers) => {
                let digits = self.digits.get(..answers);
                let digits =
                    digits.ok_or_else(|| format!("a local judge ranks 9 answers at most, and has {answers}"))?;
                let said = self.model.next(&prompt, digits).map_err(|e| e.to_string())?;
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

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        let failed = |reason: String| RewardError::Failed { name: self.id.clone(), row: 0, reason };
        questions.iter().map(|q| self.reply(q).map_err(failed)).collect()
    }
}
