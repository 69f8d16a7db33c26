//! A judge behind an OpenAI-compatible chat completions endpoint, through the `async-openai` client.

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

use super::endpoint::{ApiSettings, Endpoint};
use super::http::{AttemptError, RequestError, RetryingClient, bounded};
use super::question::{Judge, Question, Reply};
use super::verdict::{CUT_OFF, QuestionKind, REFUSED, parse_verdict};

/// A model on a server, sampled at temperature 0.
pub struct ApiJudge {
    id: String,
    settings: ApiSettings,
    client: RetryingClient,
}

impl ApiJudge {
    /// Creates a client. `endpoint.url` is the full URL of `chat/completions` or its base. Cancelling `stop` ends
    /// requests and pauses between retries.
    pub fn new(settings: ApiSettings, endpoint: Endpoint, stop: CancellationToken) -> Result<Self, String> {
        let id = format!("{} at {}", settings.model, endpoint.url);
        Ok(Self { id, settings, client: RetryingClient::new(endpoint, stop)? })
    }

    /// Request body of a question.
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

    /// Sends one request, without retries.
    async fn send(&self, body: &Value) -> Result<(String, Usage), AttemptError> {
        let server = Server {
            base: self.client.endpoint.url.trim_end_matches('/').trim_end_matches("/chat/completions").into(),
            token: SecretString::from(self.client.token()?.unwrap_or_default()),
        };
        let client = Client::with_config(server).with_http_service(SingleAttempt(self.client.http.clone()));
        let answer: Value = client.chat().create_byot(body).await.map_err(attempt_error)?;
        self.read(&answer).map_err(|reason| AttemptError::transient(format!("the response cannot be used: {reason}")))
    }

    /// Text and usage of a response.
    fn read(&self, answer: &Value) -> Result<(String, Usage), String> {
        let tokens = |name: &str| answer["usage"][name].as_u64().unwrap_or(0);
        let (input_tokens, output_tokens) = (tokens("prompt_tokens"), tokens("completion_tokens"));
        let prices = self.settings.prices;
        let money = (input_tokens as f64 * prices.input + output_tokens as f64 * prices.output) / 1_000_000.0;
        let usage = Usage { calls: 1, input_tokens, output_tokens, money };
        let choice = &answer["choices"][0];
        let message = &choice["message"];
        let refusal = message["refusal"].as_str().filter(|refusal| !refusal.is_empty());
        let cut_off = matches!(choice["finish_reason"].as_str(), Some("length" | "content_filter"));
        match (message["content"].as_str(), refusal) {
            // A refusal is a reply without a verdict; a retry would cost as much and be refused again.
            (_, Some(refusal)) => Ok((format!("{REFUSED}{refusal}"), usage)),
            // What looks like a verdict may be part of a sentence that was to go on.
            (Some(text), None) if cut_off => Ok((format!("{CUT_OFF}{text}"), usage)),
            (Some(text), None) => Ok((text.to_string(), usage)),
            (None, None) => Err("it has no `choices[0].message.content`".into()),
        }
    }

    fn reply(&self, question: &Question) -> Result<Reply, RequestError> {
        let body = self.body(question);
        let (raw, usage) = self.client.with_retries(|| self.send(&body))?;
        Ok(Reply { verdict: parse_verdict(question.kind, &raw), raw, usage })
    }
}

impl Judge for ApiJudge {
    fn id(&self) -> &str {
        &self.id
    }

    fn timeout(&self) -> Option<Duration> {
        self.client.timeout()
    }

    fn ask(&self, questions: &[Question]) -> Result<Vec<Reply>, RewardError> {
        self.client.map_concurrently(questions, |q| self.reply(q)).map_err(|e| e.into_reward_error(&self.id, 0))
    }
}

/// JSON schema of a structured reply: the reason first, then the verdict.
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

/// Base URL and token of one server. Unlike async-openai's own configuration, it reads no `OPENAI_*` variables.
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

/// HTTP service without retries of its own: [`RetryingClient`] retries, within its limits and until the job is stopped.
#[derive(Clone)]
struct SingleAttempt(reqwest::Client);

impl tower_service::Service<HttpRequestFactory> for SingleAttempt {
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
                let bounded = bounded(response).await.map_err(|e| OpenAIError::Boxed(Box::new(e)))?;
                return Ok(bounded);
            }
            // Converted here, where the status and the `Retry-After` header are still known.
            Err(OpenAIError::Boxed(Box::new(AttemptError::of(response).await)))
        })
    }
}

fn attempt_error(error: OpenAIError) -> AttemptError {
    match error {
        OpenAIError::Boxed(error) => match error.downcast::<AttemptError>() {
            Ok(error) => *error,
            Err(error) => AttemptError::transient(error.to_string()),
        },
        OpenAIError::Reqwest(error) => error.into(),
        OpenAIError::JSONDeserialize(error, _) => AttemptError::transient(format!("the response is no JSON: {error}")),
        other => AttemptError::transient(other.to_string()),
    }
}
