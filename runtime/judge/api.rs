//! A judge behind an OpenAI-compatible chat endpoint, through the `async-openai` client.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use async_openai::Client;
use async_openai::config::Config;
use async_openai::error::OpenAIError;
use async_openai::middleware::HttpRequestFactory;
use rehearsal_actors::RewardError;
use rehearsal_store::Usage;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use secrecy::SecretString;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::http::{Caller, Failure, PostError};
use super::{Endpoint, Judge, Question, QuestionKind, Reply, understand};

/// A model that a server runs, at temperature 0.
pub struct ApiJudge {
    id: String,
    settings: ApiSettings,
    caller: Caller,
}

/// How a judge behind an endpoint is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiSettings {
    /// What the server calls the model.
    pub model: String,
    /// Tokens of a reply at most.
    pub tokens_max: usize,
    pub prices: Prices,
    /// The reply is an object of a given form, which the server enforces (structured outputs), in the place of words.
    pub structured: bool,
}

/// What a million tokens cost, in whatever currency.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Prices {
    pub input: f64,
    pub output: f64,
}

impl ApiJudge {
    /// `endpoint.url` is that of `chat/completions`, or of what stands before it; pauses between tries end with `stop`.
    pub fn new(settings: ApiSettings, endpoint: Endpoint, stop: CancellationToken) -> Result<Self, String> {
        let id = format!("{} at {}", settings.model, endpoint.url);
        Ok(Self { id, settings, caller: Caller::new(endpoint, stop)? })
    }

    fn body(&self, question: &Question) -> Value {
        let user = json!({"role": "user", "content": question.text});
        let messages = match question.system.as_str() {
            "" => json!([user]),
            system => json!([{"role": "system", "content": system}, user]),
        };
        let mut body = json!({
            "model": self.settings.model, "temperature": 0, "max_tokens": self.settings.tokens_max, "stream": false,
            "messages": messages,
        });
        if self.settings.structured {
            let schema = json!({"name": "verdict", "strict": true, "schema": schema(question.kind)});
            body["response_format"] = json!({"type": "json_schema", "json_schema": schema});
        }
        body
    }

    async fn once(&self, body: &Value) -> Result<(String, Usage), Failure> {
        let server = Server {
            base: self.caller.endpoint.url.trim_end_matches('/').trim_end_matches("/chat/completions").into(),
            token: SecretString::from(self.caller.token()?.unwrap_or_default()),
        };
        let client = Client::with_config(server).with_http_service(Once(self.caller.client.clone()));
        let answer: Value = client.chat().create_byot(body).await.map_err(failure)?;
        self.read(&answer).map_err(|reason| Failure::again(format!("its answer cannot be used: {reason}")))
    }

    fn read(&self, answer: &Value) -> Result<(String, Usage), String> {
        let tokens = |name: &str| answer["usage"][name].as_u64().unwrap_or(0);
        let (input_tokens, output_tokens) = (tokens("prompt_tokens"), tokens("completion_tokens"));
        let prices = self.settings.prices;
        let money = (input_tokens as f64 * prices.input + output_tokens as f64 * prices.output) / 1_000_000.0;
        let usage = Usage { calls: 1, input_tokens, output_tokens, money };
        let message = &answer["choices"][0]["message"];
        match (message["content"].as_str(), message["refusal"].as_str()) {
            (Some(text), _) => Ok((text.to_string(), usage)),
            // A refusal is an answer: it cannot be read, and asking again would be paid for.
            (None, Some(refusal)) => Ok((format!("refused: {refusal}"), usage)),
            (None, None) => Err("no `choices[0].message.content`".into()),
        }
    }

    fn reply(&self, question: &Question) -> Result<Reply, PostError> {
        let body = self.body(question);
        let (raw, usage) = self.caller.ask(|| self.once(&body))?;
        Ok(Reply { verdict: understand(question.kind, &raw), raw, usage })
    }
}

impl Judge for ApiJudge {
    fn id(&self) -> &str {
        &self.id
    }

    fn patience(&self) -> Option<Duration> {
        self.caller.patience()
    }

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        self.caller.all(questions, |q| self.reply(q)).map_err(|e| e.of(&self.id, 0))
    }
}

/// The form of a structured reply: its reasons, then the verdict.
fn schema(kind: QuestionKind) -> Value {
    let verdict = match kind {
        QuestionKind::Pair => json!({"type": "string", "enum": ["1", "2", "tie"]}),
        QuestionKind::Grade => json!({"type": "number"}),
        QuestionKind::Ranking(_) => json!({"type": "string"}),
    };
    json!({
        "type": "object", "additionalProperties": false, "required": ["reason", "verdict"],
        "properties": {"reason": {"type": "string"}, "verdict": verdict},
    })
}

/// One server with its token, and nothing from the environment that was meant for another.
struct Server {
    base: String,
    token: SecretString,
}

impl Config for Server {
    fn headers(&self) -> HeaderMap {
        use secrecy::ExposeSecret;
        let token = self.token.expose_secret();
        let bearer = HeaderValue::from_str(&format!("Bearer {token}")).ok().filter(|_| !token.is_empty());
        bearer.into_iter().map(|bearer| (AUTHORIZATION, bearer)).collect()
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn query(&self) -> Vec<(&str, &str)> {
        Vec::new()
    }

    fn api_base(&self) -> &str {
        &self.base
    }

    fn api_key(&self) -> &SecretString {
        &self.token
    }
}

/// Sends a request once: trying again is the caller's, who knows how long and whether the job is to stop.
#[derive(Clone)]
struct Once(reqwest::Client);

impl tower_service::Service<HttpRequestFactory> for Once {
    type Response = reqwest::Response;
    type Error = OpenAIError;
    type Future = Pin<Box<dyn Future<Output = Result<reqwest::Response, OpenAIError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), OpenAIError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequestFactory) -> Self::Future {
        let client = self.0.clone();
        Box::pin(async move {
            let response = client.execute(request.build().await?).await?;
            if response.status().is_success() {
                return Ok(response);
            }
            // Said here, where the status and the pause that the server asks for are still known.
            Err(OpenAIError::Boxed(Box::new(Failure::of(response).await)))
        })
    }
}

fn failure(error: OpenAIError) -> Failure {
    match error {
        OpenAIError::Boxed(error) => match error.downcast::<Failure>() {
            Ok(failure) => *failure,
            Err(error) => Failure::again(error.to_string()),
        },
        OpenAIError::Reqwest(error) => error.into(),
        OpenAIError::JSONDeserialize(error, _) => Failure::again(format!("its answer is no JSON: {error}")),
        other => Failure::again(other.to_string()),
    }
}
