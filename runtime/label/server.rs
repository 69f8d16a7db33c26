//! The page and its four requests. Whoever is not on this machine needs a token; a browser that was lured here by another
//! site gets nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::board::Word;
use super::desk::Desk;
use crate::error::{Error, Result};
use crate::job::blocking;
use crate::run::now_ms;

const PAGE: &str = include_str!("page/index.html");
const SCRIPT: &str = include_str!("page/page.js");
const STYLE: &str = include_str!("page/page.css");

/// Nothing but the page's own files: what a completion contains cannot load or run anything.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Who may label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Whoever can open a page on this machine.
    Local,
    /// Whoever has the token that was given.
    Given(String),
    /// Whoever has the token that was made for the occasion, and is to be shown.
    Made(String),
}

impl Access {
    /// A token unless the address is this machine's own: the one given, or a new one.
    pub fn to(address: SocketAddr, token: Option<String>) -> Result<Self> {
        if let Some(token) = token {
            return match token.len() {
                0..16 => Err(Error::Usage("a token needs 16 characters or more".into())),
                _ => Ok(Self::Given(token)),
            };
        }
        if address.ip().is_loopback() {
            return Ok(Self::Local);
        }
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|e| Error::Usage(format!("no token can be made: {e}")))?;
        Ok(Self::Made(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// From an environment variable, if one is named.
    pub fn from_env(address: SocketAddr, name: Option<&str>) -> Result<Self> {
        let missing = |name| Error::Usage(format!("the environment has no {name}"));
        let token = name.map(|name| std::env::var(name).map_err(|_| missing(name))).transpose()?;
        Self::to(address, token)
    }

    /// Where the page is. The token stands behind `#`, which browsers send to nobody; one that was given is not repeated.
    pub fn url(&self, address: SocketAddr) -> String {
        match self {
            Self::Local => format!("http://{address}/"),
            Self::Given(_) => format!("http://{address}/#TOKEN"),
            Self::Made(token) => format!("http://{address}/#{token}"),
        }
    }
}

/// The page, served until this is dropped.
pub struct Served {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Page {
    desk: Arc<Desk>,
    access: Arc<Access>,
    /// A job asks for more from time to time; a file has an end.
    live: bool,
}

/// Serves a desk on an address.
pub async fn serve(desk: Arc<Desk>, address: SocketAddr, access: Access, live: bool) -> Result<Served> {
    let error = |e: std::io::Error| Error::Listen { what: "the page for labellers", address, reason: e.to_string() };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let address = listener.local_addr().map_err(error)?;
    let page = Page { desk, access: Arc::new(access), live };
    let api = Router::new()
        .route("/api/next", get(next))
        .route("/api/say", post(say))
        .route("/api/undo", post(undo))
        .route("/api/progress", get(progress))
        .route_layer(middleware::from_fn_with_state(page.clone(), guard));
    let asset = |kind: &'static str, body: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], body) })
    };
    let router = Router::new()
        .route("/", asset("text/html; charset=utf-8", PAGE))
        .route("/page.js", asset("text/javascript; charset=utf-8", SCRIPT))
        .route("/page.css", asset("text/css; charset=utf-8", STYLE))
        .merge(api)
        .layer(middleware::map_response(headers))
        .with_state(page);
    let task = tokio::spawn(async move {
        // Ends with the task; an error of one connection is that connection's.
        let _ = axum::serve(listener, router).await;
    });
    Ok(Served { address, task })
}

async fn headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Lets in who may come in.
async fn guard(State(page): State<Page>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let refused = match &*page.access {
        // A name that another site had pointed at this machine is not this machine's.
        Access::Local => (!is_local(headers)).then_some("open the page by the address of this machine"),
        Access::Given(token) | Access::Made(token) => {
            (!has_token(headers, token)).then_some("the token is missing or wrong")
        }
    };
    match refused {
        Some(reason) => (StatusCode::FORBIDDEN, Json(json!({"error": reason}))).into_response(),
        None => next.run(request).await,
    }
}

fn is_local(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.ends_with(']') { host } else { name });
    name == "localhost" || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|h| h.to_str().ok()?.strip_prefix("Bearer "));
    // Hashes are compared in constant time.
    given.is_some_and(|given| blake3::hash(given.as_bytes()) == blake3::hash(token.as_bytes()))
}

#[derive(Deserialize)]
struct Who {
    labeller: String,
}

async fn next(State(page): State<Page>, Query(who): Query<Who>) -> Response {
    let (desk, live) = (page.desk, page.live);
    answer(blocking(move || Ok(json!({"item": desk.next(&who.labeller, now_ms())?, "live": live}))).await)
}

#[derive(Deserialize)]
struct Said {
    labeller: String,
    item: u64,
    /// A rank for each completion by its place in the item.
    ranks: Option<Vec<u32>>,
    text: Option<String>,
}

async fn say(State(page): State<Page>, Json(said): Json<Said>) -> Response {
    let word = match (said.ranks, said.text) {
        (Some(ranks), None) => Word::Ranks(ranks),
        (None, Some(text)) => Word::Wrote(text),
        (None, None) => Word::Skipped,
        (Some(_), Some(_)) => return answer(Err("a ranking or a text, not both".into())),
    };
    answer(blocking(move || page.desk.say(&said.labeller, said.item, word, now_ms()).map(|()| json!({}))).await)
}

async fn undo(State(page): State<Page>, Json(who): Json<Who>) -> Response {
    answer(blocking(move || page.desk.undo(&who.labeller, now_ms()).map(|()| json!({}))).await)
}

async fn progress(State(page): State<Page>) -> Response {
    answer(blocking(move || Ok(json!(page.desk.progress()))).await)
}

fn answer(result: std::result::Result<Value, String>) -> Response {
    match result {
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
    fn an_address_that_others_reach_has_a_token() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(Access::to(address("127.0.0.1:1"), None).unwrap(), Access::Local);
        let Access::Made(token) = Access::to(address("0.0.0.0:1"), None).unwrap() else { panic!("no token") };
        assert_eq!(token.len(), 32);
        assert!(Access::to(address("127.0.0.1:1"), Some("short".into())).is_err());
        let access = Access::to(address("127.0.0.1:1"), Some("a-token-of-our-own".into())).unwrap();
        assert_eq!(access.url(address("127.0.0.1:1")), "http://127.0.0.1:1/#TOKEN");
    }
}
