//! Who may use a page, and how that is checked.
//!
//! Beyond loopback, requests need a bearer token. On loopback, the `Host` header must name this machine, which keeps
//! out other sites that are open in the same browser (DNS rebinding). Requests that a browser says come from another
//! site are refused, and changes with another `Origin`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::error::{Error, Result};

/// Access control of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// No token; requests must be for a loopback host name.
    Loopback,
    /// Reading needs a loopback host name and no token; requests that change something need the token, which was generated
    /// at start and which the URL shows.
    LoopbackToRead(String),
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
        Ok(Self::GeneratedToken(generate()?))
    }

    /// The same, except that changes need a token on loopback too.
    #[must_use = "the access that was given stays as it is"]
    pub fn with_token_to_change(self) -> Result<Self> {
        Ok(match self {
            Self::Loopback => Self::LoopbackToRead(generate()?),
            with_token => with_token,
        })
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
            Self::GeneratedToken(token) | Self::LoopbackToRead(token) => format!("http://{address}/#{token}"),
        }
    }

    /// Why a request is refused.
    fn refusal(&self, method: &Method, headers: &HeaderMap) -> Option<&'static str> {
        const TOKEN: &str = "the token is missing or wrong; open the page by its full URL, with the part after #";
        const LOCAL: &str = "open the page by 127.0.0.1 or localhost";
        let changes = !method.is_safe();
        if is_cross_site(headers) || (changes && !is_own_origin(headers)) {
            return Some("the request comes from another site; open the page itself");
        }
        match self {
            Self::Loopback => (!is_local(headers)).then_some(LOCAL),
            Self::LoopbackToRead(_) if !is_local(headers) => Some(LOCAL),
            Self::LoopbackToRead(token) => (changes && !has_token(headers, token)).then_some(TOKEN),
            Self::Token(token) | Self::GeneratedToken(token) => (!has_token(headers, token)).then_some(TOKEN),
        }
    }
}

/// A token that nobody can guess: 128 random bits in hexadecimal digits.
fn generate() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::Usage(format!("the system gave no random bytes for a token: {e}")))?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Refuses requests without access, with status 403.
pub(crate) async fn authorize(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    match access.refusal(request.method(), request.headers()) {
        Some(reason) => (StatusCode::FORBIDDEN, Json(json!({"error": reason}))).into_response(),
        None => next.run(request).await,
    }
}

/// Whether a browser says that another site made the request. Programs that are no browsers say nothing.
fn is_cross_site(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none")
}

/// Whether the request's `Origin`, which browsers send with every change, is the server's own. Programs that are no browsers
/// send none.
fn is_own_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let Some(origin) = text(header::ORIGIN) else { return true };
    let host = origin.split_once("://").map(|(_, host)| host);
    host.is_some() && host == text(header::HOST)
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

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

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

    fn headers(of: &[(&'static str, &str)]) -> HeaderMap {
        of.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn reading_on_loopback_is_free_and_changing_needs_the_token() {
        let access = Access::Loopback.with_token_to_change().unwrap();
        let Access::LoopbackToRead(token) = &access else { panic!("{access:?}") };
        let bearer = format!("Bearer {token}");
        let (host, auth) = (("host", "127.0.0.1:9"), ("authorization", bearer.as_str()));
        let refused = |method: Method, of: &[(&'static str, &str)]| access.refusal(&method, &headers(of)).is_some();
        assert!(!refused(Method::GET, &[host]));
        assert!(refused(Method::GET, &[("host", "evil.example")]), "another name of this machine");
        assert!(refused(Method::POST, &[host]) && refused(Method::DELETE, &[host]));
        assert!(refused(Method::POST, &[host, ("authorization", "Bearer guess")]));
        assert!(!refused(Method::POST, &[host, auth]));
        assert!(!refused(Method::POST, &[host, auth, ("origin", "http://127.0.0.1:9")]));
        for origin in ["http://evil.example", "http://127.0.0.1:10", "null", ""] {
            assert!(refused(Method::POST, &[host, auth, ("origin", origin)]), "{origin}");
        }
        assert!(refused(Method::POST, &[host, auth, ("sec-fetch-site", "cross-site")]));
        assert!(refused(Method::GET, &[host, ("sec-fetch-site", "same-site")]));
    }
}
