//! A judge behind an OpenAI-compatible chat endpoint.

use std::time::Duration;

use rehearsal_actors::RewardError;
use rehearsal_store::Usage;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::http::PostError;
use super::{Endpoint, Judge, Question, Reply, understand};

/// A model that a server runs, at temperature 0.
pub struct ApiJudge {
    id: String,
    model: String,
    endpoint: Endpoint,
    tokens_max: usize,
    prices: Prices,
    stop: CancellationToken,
}

/// What a million tokens cost, in whatever currency.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Prices {
    pub input: f64,
    pub output: f64,
}

impl ApiJudge {
    /// `endpoint.url` is that of `chat/completions`; pauses between tries end with `stop`.
    pub fn new(model: &str, endpoint: Endpoint, tokens_max: usize, prices: Prices, stop: CancellationToken) -> Self {
        Self { id: format!("{model} at {}", endpoint.url), model: model.into(), endpoint, tokens_max, prices, stop }
    }

    fn reply(&self, question: &Question) -> Result<Reply, PostError> {
        let user = json!({"role": "user", "content": question.text});
        let messages = match question.system.as_str() {
            "" => json!([user]),
            system => json!([{"role": "system", "content": system}, user]),
        };
        let body = json!({
            "model": self.model, "temperature": 0, "max_tokens": self.tokens_max, "stream": false,
            "messages": messages,
        });
        let (raw, usage) = self.endpoint.post(&body, &self.stop, |value| {
            let tokens = |name: &str| value["usage"][name].as_u64().unwrap_or(0);
            let (input_tokens, output_tokens) = (tokens("prompt_tokens"), tokens("completion_tokens"));
            let money =
                (input_tokens as f64 * self.prices.input + output_tokens as f64 * self.prices.output) / 1_000_000.0;
            let usage = Usage { calls: 1, input_tokens, output_tokens, money };
            let message = &value["choices"][0]["message"];
            match (message["content"].as_str(), message["refusal"].as_str()) {
                (Some(text), _) => Ok((text.to_string(), usage)),
                // A refusal is an answer: it cannot be read, and asking again would be paid for.
                (None, Some(refusal)) => Ok((format!("refused: {refusal}"), usage)),
                (None, None) => Err("no `choices[0].message.content`".into()),
            }
        })?;
        let verdict = understand(question.kind, &raw);
        Ok(Reply { raw, verdict, usage })
    }
}

impl Judge for ApiJudge {
    fn id(&self) -> &str {
        &self.id
    }

    fn patience(&self) -> Option<Duration> {
        self.endpoint.patience()
    }

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        self.endpoint.all(questions, |q| self.reply(q)).map_err(|e| e.of(&self.id, 0))
    }
}
