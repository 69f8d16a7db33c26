//! Prometheus exporter: a recorder of the job's own, and an HTTP server for its metrics. Nothing global is installed.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::http::{Bounded, Limits};
use crate::listen::{self, Bound};
use crate::metrics::SECONDS_BUCKETS;
pub use crate::readiness::Readiness;

/// A scrape is one short request and one answer; each connection carries one.
const LIMITS: Limits =
    Limits { connections_max: 16, connection: Duration::from_secs(10), received_bytes_max: 16 * 1024 };
/// Time between two upkeeps of the recorder, which move samples into the histograms' buckets; without them the samples
/// stay in memory.
const UPKEEP: Duration = Duration::from_secs(5);
/// Prometheus' text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A recorder for Prometheus with buckets for the histograms.
pub fn recorder() -> PrometheusRecorder {
    let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS_BUCKETS);
    // The only failure is an empty list of buckets.
    builder.unwrap_or_else(|_| PrometheusBuilder::new()).build_recorder()
}

/// The running server; dropping it stops it.
pub struct Server {
    /// The address it listens on, with the port that was assigned if the setting's was 0.
    pub address: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Serves a recorder's metrics and the job's health over HTTP/1.1, until the server is dropped.
///
/// - `/metrics`: every metric, in Prometheus' text format.
/// - `/healthz`: 200 while the process answers.
/// - `/readyz`: 200 while `readiness` is set, 503 otherwise.
///
/// Only GET and HEAD are answered (405 otherwise). At most 16 connections are open at a time; each carries one request of
/// at most 16 KiB and is closed after 10 seconds.
///
/// # Errors
///
/// `Error::Listen` if the address cannot be bound.
pub async fn serve(handle: PrometheusHandle, address: SocketAddr, readiness: Readiness) -> Result<Server> {
    serve_on(listen::bind("metrics", "metrics.listen", address)?, handle, readiness)
}

/// As [`serve`], on an address that is bound.
pub(crate) fn serve_on(bound: Bound, handle: PrometheusHandle, readiness: Readiness) -> Result<Server> {
    serve_within(LIMITS, bound, handle, readiness)
}

fn serve_within(limits: Limits, bound: Bound, handle: PrometheusHandle, readiness: Readiness) -> Result<Server> {
    let address = bound.address;
    let refused = |e: std::io::Error| Error::Listen { what: "metrics", address, reason: e.to_string() };
    let listener = Bounded::new(bound, limits).map_err(refused)?;
    let upkeep = handle.clone();
    let router = Router::new()
        .route("/metrics", get(render))
        .with_state(handle)
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready).with_state(readiness))
        .fallback(async || (StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n"))
        .layer(map_response(headers));
    let tasks = vec![
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP).await;
                upkeep.run_upkeep();
            }
        }),
        tokio::spawn(async move {
            // Runs until the task is aborted; an error of a connection ends that connection only.
            let _ = axum::serve(listener, router).await;
        }),
    ];
    Ok(Server { address, tasks })
}

async fn render(State(handle): State<PrometheusHandle>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], handle.render())
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    if readiness.is_ready() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready: the job is restoring its state, or has ended\n").into_response()
    }
}

async fn headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::Instant;

    use super::*;

    async fn server() -> (Server, Readiness, PrometheusRecorder) {
        let (recorder, readiness) = (recorder(), Readiness::default());
        let address = "127.0.0.1:0".parse().unwrap();
        (serve(recorder.handle(), address, readiness.clone()).await.unwrap(), readiness, recorder)
    }

    /// Sends bytes and reads until the server closes the connection.
    async fn exchange(address: SocketAddr, request: impl Into<Vec<u8>>) -> String {
        let request = request.into();
        let exchange = move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            let _ = stream.write_all(&request); // the server may close before it has read everything
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer); // a reset ends the answer as well
            String::from_utf8(answer).unwrap()
        };
        tokio::task::spawn_blocking(exchange).await.unwrap()
    }

    async fn request(address: SocketAddr, method: &str, path: &str) -> String {
        exchange(address, format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await
    }

    #[tokio::test]
    async fn metrics_are_served_in_prometheus_text_format() {
        let (server, _, recorder) = server().await;
        metrics::with_local_recorder(&recorder, || metrics::gauge!("rehearsal_kl").set(0.5));
        let answer = request(server.address, "GET", "/metrics?x=1").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{answer}");
        assert!(answer.contains("connection: close\r\n"), "{answer}");
        assert!(answer.ends_with("rehearsal_kl 0.5\n\n"), "{answer}");
        let head = request(server.address, "HEAD", "/metrics").await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[tokio::test]
    async fn readiness_follows_the_job_and_health_does_not() {
        let (server, readiness, _recorder) = server().await;
        let status = async |path: &str| request(server.address, "GET", path).await[9..12].to_string();
        assert_eq!((status("/healthz").await, status("/readyz").await), ("200".into(), "503".into()));
        readiness.set(true);
        assert_eq!((status("/healthz").await, status("/readyz").await), ("200".into(), "200".into()));
        readiness.set(false);
        assert_eq!((status("/healthz").await, status("/readyz").await), ("200".into(), "503".into()));
    }

    #[tokio::test]
    async fn other_methods_and_paths_are_refused() {
        let (server, ..) = server().await;
        for method in ["POST", "PUT", "DELETE", "OPTIONS"] {
            let answer = request(server.address, method, "/metrics").await;
            assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET,HEAD\r\n"), "{answer}");
        }
        let answer = request(server.address, "GET", "/").await;
        assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("/metrics"), "{answer}");
    }

    #[tokio::test]
    async fn requests_have_a_size_limit() {
        let (server, ..) = server().await;
        let padding = "a".repeat(2 * LIMITS.received_bytes_max);
        for request in [
            format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nX-Padding: {padding}\r\n\r\n"),
            format!("GET /{padding} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ] {
            let answer = exchange(server.address, request).await;
            assert!(!answer.contains("HTTP/1.1 200"), "{answer}");
        }
        assert!(request(server.address, "GET", "/healthz").await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn slow_clients_are_cut_off_and_others_wait_for_their_place() {
        let limits = Limits { connections_max: 2, connection: Duration::from_secs(1), ..LIMITS };
        let bound = listen::bind("metrics", "metrics.listen", "127.0.0.1:0".parse().unwrap()).unwrap();
        let server = serve_within(limits, bound, recorder().handle(), Readiness::default()).unwrap();
        let open = |_| {
            let mut stream = TcpStream::connect(server.address).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\n").unwrap(); // and never the rest
            stream
        };
        let start = Instant::now();
        let slow: Vec<TcpStream> = (0..limits.connections_max).map(open).collect();
        // Every place is taken until the deadline of the slow ones.
        assert!(request(server.address, "GET", "/healthz").await.starts_with("HTTP/1.1 200"));
        let waited = start.elapsed();
        assert!(waited > limits.connection / 2, "answered after {waited:?}: connections are not bounded");
        drop(slow);
    }

    #[tokio::test]
    async fn a_busy_port_is_named_with_what_to_do() {
        let (server, ..) = server().await;
        let error = serve(recorder().handle(), server.address, Readiness::default()).await.err().unwrap().to_string();
        let want = format!(
            "metrics cannot be served on {}: another process listens there; stop it, or set `metrics.listen` to a free \
             port (`127.0.0.1:0` takes any)",
            server.address
        );
        assert_eq!(error, want);
    }
}
