//! The coordinator's side: an HTTPS server that gives leases, weights, and takes completions.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use rehearsal_actors::{LoraInit, ModelFiles};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::task::JoinHandle;

use super::leases::{Leases, Refusal};
use super::protocol::{BODY_MAX, Beat, Beaten, Bits, Delivery, Join, Joined};
use super::settings::Credentials;
use super::tls::{Peer, TlsListener};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::listen::{self, Bound};

/// The service, in errors.
const WHAT: &str = "the nodes' address";

/// How long a request for a lease waits for something to do.
const PATIENCE: Duration = Duration::from_secs(10);

/// What all nodes generate with.
pub struct Base {
    pub files: ModelFiles,
    /// Weights that the policy started from.
    pub start: Weights,
    pub bf16: bool,
    pub lora: Option<LoraInit>,
    pub lease: Duration,
}

/// Leases that requests and the job share.
pub struct Shared {
    leases: Mutex<Leases>,
    /// Told of each change that somebody may wait for.
    changed: Notify,
    base: Base,
    bits: Bits,
    /// Bytes of shards that were asked for.
    bytes: AtomicU64,
}

impl Shared {
    pub fn new(leases: Leases, base: Base) -> Self {
        Self { leases: Mutex::new(leases), changed: Notify::new(), base, bits: Bits::here(), bytes: AtomicU64::new(0) }
    }

    /// The leases, for as short as possible.
    pub fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of shards that were asked for.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Changes the leases, and tells those who wait.
    pub fn change<T>(&self, f: impl FnOnce(&mut Leases) -> T) -> T {
        let result = f(&mut self.leases());
        self.changed.notify_waiters();
        result
    }

    /// Completes at the next change after this call.
    pub fn changed(&self) -> Pin<Box<Notified<'_>>> {
        let mut changed = Box::pin(self.changed.notified());
        changed.as_mut().enable();
        changed
    }
}

/// A server that nodes join at, until it is dropped.
pub struct Server {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Binds the address of nodes.
pub fn bind(address: SocketAddr) -> Result<Bound> {
    listen::bind(WHAT, "nodes.listen", address)
}

/// Serves nodes on an address that is bound.
pub fn serve(bound: Bound, credentials: &Credentials, shared: Arc<Shared>) -> Result<Server> {
    let address = bound.address;
    let config = credentials.server()?;
    let listener =
        TlsListener::new(bound, config).map_err(|e| Error::Listen { what: WHAT, address, reason: e.to_string() })?;
    let router = Router::new()
        .route("/v1/join", post(join))
        .route("/v1/lease", post(lease))
        .route("/v1/beat", post(beat))
        .route("/v1/deliver", post(deliver))
        .route("/v1/leave", post(leave))
        .route("/v1/shards/{hash}", get(shard))
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(shared)
        .into_make_service_with_connect_info::<Peer>();
    let task = tokio::spawn(async move {
        // Runs until the task is aborted; errors of single connections do not end it.
        let _ = axum::serve(listener, router).await;
    });
    Ok(Server { address, task })
}

/// A request that is refused: its status, and why.
struct Refused(StatusCode, String);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (self.0, self.1).into_response()
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unknown => Self(StatusCode::UNAUTHORIZED, "join first".into()),
            Refusal::Excluded(reason) => Self(StatusCode::FORBIDDEN, reason),
        }
    }
}

type Answer<T> = std::result::Result<T, Refused>;

fn read<T: DeserializeOwned>(body: &Bytes) -> Answer<T> {
    let unreadable = |e| Refused(StatusCode::BAD_REQUEST, format!("the request cannot be read: {e}"));
    postcard::from_bytes(body).map_err(unreadable)
}

fn answer(message: &impl Serialize) -> Answer<Vec<u8>> {
    postcard::to_stdvec(message).map_err(|e| Refused(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

async fn join(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(Peer(identity)): ConnectInfo<Peer>,
    body: Bytes,
) -> Answer<Vec<u8>> {
    let Join { name, bits } = read(&body)?;
    if let Some(reason) = bits.differ(&shared.bits) {
        tracing::warn!("node {name} was refused: {reason}");
        return Err(Refused(StatusCode::CONFLICT, reason));
    }
    let mut session = [0; 8];
    getrandom::fill(&mut session).map_err(|e| Refused(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    let session = u64::from_le_bytes(session);
    // Several nodes may share a certificate; each has its name.
    let identity = format!("{identity} {name}");
    let joined = shared.change(|leases| leases.join(session, &name, &identity, Instant::now()));
    joined?;
    let base = &shared.base;
    answer(&Joined {
        session,
        files: base.files.clone(),
        start: base.start.manifest.clone(),
        bf16: base.bf16,
        lora: base.lora.clone(),
        lease_seconds: base.lease.as_secs(),
    })
}

/// Waits for something to do: an empty answer says that there was nothing.
async fn lease(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<Vec<u8>> {
    let session: u64 = read(&body)?;
    let deadline = Instant::now() + PATIENCE.min(shared.base.lease / 2);
    loop {
        let changed = shared.changed();
        let found = shared.leases().take(session, Instant::now())?;
        let left = deadline.saturating_duration_since(Instant::now());
        if found.is_some() || left.is_zero() {
            return answer(&found);
        }
        let _ = tokio::time::timeout(left, changed).await; // either will do
    }
}

async fn beat(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<Vec<u8>> {
    let Beat { session, lease } = read(&body)?;
    let holds = shared.leases().renew(session, lease, Instant::now())?;
    answer(&Beaten { holds })
}

async fn deliver(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<StatusCode> {
    let Delivery { session, lease, completions } = read(&body)?;
    let delivered = shared.change(|leases| leases.deliver(session, lease, completions, Instant::now()));
    delivered?;
    Ok(StatusCode::NO_CONTENT)
}

async fn leave(State(shared): State<Arc<Shared>>, body: Bytes) -> Answer<StatusCode> {
    let session: u64 = read(&body)?;
    shared.change(|leases| leases.leave(session));
    Ok(StatusCode::NO_CONTENT)
}

/// A shard, or what of it begins at the byte that the request's range names.
async fn shard(State(shared): State<Arc<Shared>>, Path(hash): Path<String>, headers: HeaderMap) -> Response {
    let found = shared.base.start.shard(&hash).or_else(|| shared.leases().shard(&hash));
    let Some(bytes) = found else { return StatusCode::NOT_FOUND.into_response() };
    let range = headers.get(header::RANGE).and_then(|range| range.to_str().ok());
    shared.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        None => Body::from(bytes).into_response(),
        Some(from) if from < bytes.len() => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, range)], Body::from(bytes.slice(from..)))
                .into_response()
        }
        Some(_) => StatusCode::RANGE_NOT_SATISFIABLE.into_response(),
    }
}
