//! Pages that a job or a command serves to a browser: access, security headers, limits.

mod access;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::middleware;
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use tokio::task::JoinHandle;

pub use access::Access;

use crate::error::{Error, Result};
use crate::http::{Bounded, Limits};
use crate::listen::Bound;

/// A request of a page is short, and each connection carries one.
const LIMITS: Limits = Limits { connections_max: 64, connection: Duration::from_secs(30), received_bytes_max: 1 << 20 };

/// Content security policy: only the page's own files, so that markup in a completion can neither load nor run
/// anything.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A running server of a page; dropping it stops the server.
pub struct WebServer {
    /// Bound address, with the port that the system chose if port 0 was requested.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A page's file that is part of the program.
pub(crate) fn asset<S: Clone + Send + Sync + 'static>(kind: &'static str, body: &'static str) -> MethodRouter<S> {
    get(move || async move { ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], body) })
}

/// Serves the files of a page to everybody and its API to those who have access. `what` names the page in errors.
pub(crate) fn serve(what: &'static str, bound: Bound, access: Access, files: Router, api: Router) -> Result<WebServer> {
    let address = bound.address;
    let refused = |e: std::io::Error| Error::Listen { what, address, reason: e.to_string() };
    let listener = Bounded::new(bound, LIMITS).map_err(refused)?;
    let authorized = api.route_layer(middleware::from_fn_with_state(Arc::new(access), access::authorize));
    let router = files.merge(authorized).layer(middleware::map_response(add_headers));
    let task = tokio::spawn(async move {
        // Runs until the task is aborted; errors of single connections do not end it.
        let _ = axum::serve(listener, router).await;
    });
    Ok(WebServer { address, task })
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
