//! A judge behind an OpenAI-compatible chat endpoint.

use rehearsal_actors::RewardError;
use serde_json::json;

use super::{Endpoint, Judge, Question, QuestionKind, Reply, grade, preference};

/// A model that a server runs, at temperature 0.
pub struct ApiJudge {
    id: String,
    model: String,
    endpoint: Endpoint,
    tokens_max: usize,
}

impl ApiJudge {
    /// `endpoint.url` is that of `chat/completions`.
    pub fn new(model: &str, endpoint: Endpoint, tokens_max: usize) -> Self {
        Self { id: format!("{model} at {}", endpoint.url), model: model.into(), endpoint, tokens_max }
    }

    fn reply(&self, question: &Question) -> Result<Reply, String> {
        let user = json!({"role": "user", "content": question.text});
        let messages = match question.system.as_str() {
            "" => json!([user]),
            system => json!([{"role": "system", "content": system}, user]),
        };
        let body = json!({
            "model": self.model, "temperature": 0, "max_tokens": self.tokens_max,
            "messages": messages,
        });
        let raw = self.endpoint.post(&body, |value| {
            let message = &value["choices"][0]["message"];
            match (message["content"].as_str(), message["refusal"].as_str()) {
                (Some(text), _) => Ok(text.to_string()),
                // A refusal is an answer: it cannot be read, and asking again would be paid for.
                (None, Some(refusal)) => Ok(format!("refused: {refusal}")),
                (None, None) => Err("no `choices[0].message.content`".into()),
            }
        })?;
        let verdict = match question.kind {
            QuestionKind::Pair => preference(&raw),
            QuestionKind::Grade => grade(&raw),
        };
        Ok(Reply { raw, verdict })
    }
}

impl Judge for ApiJudge {
    fn id(&self) -> &str {
        &self.id
    }

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        let failed = |reason| RewardError::Failed { name: self.id.clone(), row: 0, reason };
        self.endpoint.all(questions, |q| self.reply(q)).map_err(failed)
    }
}
