//! Prometheus: a recorder of the job's own, and a small listener. Nothing global is installed.

use std::net::SocketAddr;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::metrics::SECONDS_BUCKETS;

/// Bytes of a request at most.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// Time a client has to send its request and take its answer.
const CLIENT: Duration = Duration::from_secs(5);
/// Time between two clean-ups of the recorder, without which histograms grow for ever.
const UPKEEP: Duration = Duration::from_secs(5);

/// A recorder for Prometheus with buckets for the histograms.
pub fn recorder() -> PrometheusRecorder {
    let builder = PrometheusBuilder::new().set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS_BUCKETS);
    // The only failure is an empty list of buckets.
    builder.unwrap_or_else(|_| PrometheusBuilder::new()).build_recorder()
}

/// Serves a recorder's metrics until it is dropped.
pub struct Server {
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

/// Serves `GET /metrics` on an address.
pub async fn serve(handle: PrometheusHandle, address: SocketAddr) -> Result<Server> {
    let error = |e: std::io::Error| Error::Listen { what: "metrics", address, reason: e.to_string() };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    let upkeep = handle.clone();
    let tasks = vec![
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(UPKEEP).await;
                upkeep.run_upkeep();
            }
        }),
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let handle = handle.clone();
                        tokio::spawn(async move {
                            // A client that is slow or gone loses its answer, nothing else.
                            let _ = tokio::time::timeout(CLIENT, answer(stream, &handle)).await;
                        });
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await, // out of descriptors: wait
                }
            }
        }),
    ];
    Ok(Server { address: bound, tasks })
}

async fn answer(mut stream: TcpStream, handle: &PrometheusHandle) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let n = stream.read(&mut buffer).await?;
        if n == 0 || request.len() + n > REQUEST_BYTES_MAX {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..n]);
    }
    let line = request.split(|&b| b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|&b| b == b' ');
    let (method, target) = (words.next(), words.next().unwrap_or_default());
    let path = target.split(|&b| b == b'?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        (Some(b"GET"), b"/metrics") => ("200 OK", handle.render()),
        (Some(b"GET"), _) => ("404 Not Found", "metrics are at /metrics\n".to_string()),
        _ => ("405 Method Not Allowed", String::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}
