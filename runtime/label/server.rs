//! HTTP server of the label page and its four API requests.
//!
//! Beyond loopback, requests need a bearer token. On loopback, the `Host` header must name this machine, which keeps
//! out other sites that are open in the same browser (DNS rebinding), and requests that a browser says come from another
//! site are refused. Connections are limited in number, time and bytes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::queue::{ItemId, LabelValue};
use super::service::LabelService;
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::http::{Bounded, Limits};
use crate::listen::{self, Bound};
use crate::time::now_ms;

/// The service, in errors.
pub(crate) const WHAT: &str = "the label page";

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const STYLE: &str = include_str!("page/page.css");

/// A request of the page is short, and each connection carries one.
const LIMITS: Limits = Limits { connections_max: 64, connection: Duration::from_secs(30), received_bytes_max: 1 << 20 };

/// Content security policy: only the page's own files, so that markup in a completion can neither load nor run
/// anything.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Access control of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// No token; requests must be for a loopback host name.
    Loopback,
    /// A token that the user configured.
    Token(String),
    /// A token generated at start, which the URL shows.
    GeneratedToken(String),
}

impl Access {
    /// Requires `token` if there is one; otherwise generates one unless `address` is loopback. Fails if `token` has
    /// fewer than 16 characters.
    pub fn to(address: SocketAddr, token: Option<String>) -> Result<Self> {
        if let Some(token) = token {
            return match token.len() {
                0..16 => Err(Error::Usage("the token has fewer than 16 characters; use a longer one".into())),
                _ => Ok(Self::Token(token)),
            };
        }
        if address.ip().is_loopback() {
            return Ok(Self::Loopback);
        }
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|e| Error::Usage(format!("the system gave no random bytes for a token: {e}")))?;
        Ok(Self::GeneratedToken(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// Like [`Access::to`], with the token in the environment variable `name`. Fails if the variable is not set.
    pub fn from_env(address: SocketAddr, name: Option<&str>) -> Result<Self> {
        let missing = |name| Error::Usage(format!("the environment variable {name} is not set; set it to the token"));
        let token = name.map(|name| std::env::var(name).map_err(|_| missing(name))).transpose()?;
        Self::to(address, token)
    }

    /// URL of the page. The token is in the fragment (after `#`), which browsers do not send; a configured token is
    /// shown as `TOKEN`.
    pub fn url(&self, address: SocketAddr) -> String {
        match self {
            Self::Loopback => format!("http://{address}/"),
            Self::Token(_) => format!("http://{address}/#TOKEN"),
            Self::GeneratedToken(token) => format!("http://{address}/#{token}"),
        }
    }
}

/// A running server; dropping it stops the server.
pub struct LabelServer {
    /// Bound address, with the port that the system chose if port 0 was requested.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for LabelServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct AppState {
    service: Arc<LabelService>,
    access: Arc<Access>,
    /// Whether items may be added later, as a job does; the items of a file are all there at the start.
    live: bool,
}

/// Serves the label page of `service` on `address`. With `live`, the page waits for more items when the queue is empty.
///
/// # Errors
///
/// `Error::Listen` if the address cannot be bound.
pub async fn serve(service: Arc<LabelService>, address: SocketAddr, access: Access, live: bool) -> Result<LabelServer> {
    serve_on(listen::bind(WHAT, "--listen", address)?, service, access, live)
}

/// As [`serve`], on an address that is bound.
pub(crate) fn serve_on(bound: Bound, service: Arc<LabelService>, access: Access, live: bool) -> Result<LabelServer> {
    let address = bound.address;
    let refused = |e: std::io::Error| Error::Listen { what: WHAT, address, reason: e.to_string() };
    let listener = Bounded::new(bound, LIMITS).map_err(refused)?;
    let state = AppState { service, access: Arc::new(access), live };
    let api = Router::new()
        .route("/api/next", get(next))
        .route("/api/label", post(submit))
        .route("/api/undo", post(undo))
        .route("/api/progress", get(progress))
        .route_layer(middleware::from_fn_with_state(state.clone(), authorize));
    let asset = |kind: &'static str, body: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], body) })
    };
    let router = Router::new()
        .route("/", asset("text/html; charset=utf-8", PAGE))
        .route("/page.js", asset("text/javascript; charset=utf-8", SCRIPT))
        .route("/page.css", asset("text/css; charset=utf-8", STYLE))
        .merge(api)
        .layer(middleware::map_response(add_headers))
        .with_state(state);
    let task = tokio::spawn(async move {
        // Runs until the task is aborted; errors of single connections do not end it.
        let _ = axum::serve(listener, router).await;
    });
    Ok(LabelServer { address, task })
}

/// Adds security headers to every response.
async fn add_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Rejects API requests without access, with status 403.
async fn authorize(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let refused = match &*state.access {
        _ if is_cross_site(headers) => Some("the request comes from another site; open the page itself"),
        Access::Loopback => (!is_local(headers)).then_some("open the page by 127.0.0.1 or localhost"),
        Access::Token(token) | Access::GeneratedToken(token) => (!has_token(headers, token))
            .then_some("the token is missing or wrong; open the page by its full URL, with the part after #"),
    };
    match refused {
        Some(reason) => (StatusCode::FORBIDDEN, Json(json!({"error": reason}))).into_response(),
        None => next.run(request).await,
    }
}

/// Whether a browser says that another site made the request. Programs that are no browsers say nothing.
fn is_cross_site(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none")
}

/// Whether the `Host` header is `localhost` or a loopback address.
fn is_local(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.ends_with(']') { host } else { name });
    name == "localhost" || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether the request carries the bearer token.
fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|h| h.to_str().ok()?.strip_prefix("Bearer "));
    // Comparison of BLAKE3 hashes takes constant time.
    given.is_some_and(|given| blake3::hash(given.as_bytes()) == blake3::hash(token.as_bytes()))
}

#[derive(Deserialize)]
struct LabellerRequest {
    labeller: String,
}

/// A label: `ranks`, `text`, or neither to skip the item.
#[derive(Deserialize)]
struct SubmitRequest {
    labeller: String,
    item: ItemId,
    /// Rank of each completion, in the item's order.
    ranks: Option<Vec<u32>>,
    /// A demonstration.
    text: Option<String>,
}

async fn next(State(state): State<AppState>, Query(request): Query<LabellerRequest>) -> Response {
    let AppState { service, live, .. } = state;
    respond(move || Ok(json!({"item": service.next(&request.labeller, now_ms())?, "live": live}))).await
}

async fn submit(State(state): State<AppState>, Json(request): Json<SubmitRequest>) -> Response {
    respond(move || {
        let value = match (request.ranks, request.text) {
            (Some(ranks), None) => LabelValue::Ranks(ranks),
            (None, Some(text)) => LabelValue::Demonstration(text),
            (None, None) => LabelValue::Skipped,
            (Some(_), Some(_)) => return Err("the request has both `ranks` and `text`; send one of them".into()),
        };
        state.service.submit(&request.labeller, request.item, value, now_ms()).map(|()| json!({}))
    })
    .await
}

async fn undo(State(state): State<AppState>, Json(request): Json<LabellerRequest>) -> Response {
    respond(move || state.service.undo(&request.labeller, now_ms()).map(|()| json!({}))).await
}

async fn progress(State(state): State<AppState>) -> Response {
    respond(move || Ok(json!(state.service.progress()))).await
}

/// Runs `work` off the async threads, because it waits for the store. Responds with its value, or with its error and
/// status 409.
async fn respond(work: impl FnOnce() -> std::result::Result<Value, String> + Send + 'static) -> Response {
    match blocking(work).await {
        Ok(value) => Json(value).into_response(),
        Err(reason) => (StatusCode::CONFLICT, Json(json!({"error": reason}))).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_this_machine_are_local() {
        let local = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            is_local(&headers)
        };
        for host in ["localhost:80", "localhost", "127.0.0.1:8765", "127.0.0.1", "[::1]:8765", "[::1]"] {
            assert!(local(host), "{host}");
        }
        for host in ["evil.example:8765", "localhost.evil.example", "192.168.0.2:80", ""] {
            assert!(!local(host), "{host}");
        }
    }

    #[test]
    fn an_address_beyond_loopback_has_a_token() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(Access::to(address("127.0.0.1:1"), None).unwrap(), Access::Loopback);
        let Access::GeneratedToken(token) = Access::to(address("0.0.0.0:1"), None).unwrap() else { panic!("no token") };
        assert_eq!(token.len(), 32);
        assert!(Access::to(address("127.0.0.1:1"), Some("short".into())).is_err());
        let access = Access::to(address("127.0.0.1:1"), Some("a-token-of-our-own".into())).unwrap();
        assert_eq!(access.url(address("127.0.0.1:1")), "http://127.0.0.1:1/#TOKEN");
    }
}
