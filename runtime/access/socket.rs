//! A running job's socket: `job.sock` in its directory. Each line is a [`Request`] in JSON, answered by a line with a
//! `Result` of a [`Reply`] or a [`Refusal`].

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::codec::{Framed, LinesCodec};

use super::live::Live;
use super::request::{Reply, Request};
use crate::blocking::blocking;
use crate::error::{At, Error, ErrorKind, Result};

/// Name of the socket in a job's directory.
const SOCKET_FILE: &str = "job.sock";
/// Connections that are served at a time; others wait.
const CONNECTIONS_MAX: usize = 16;
/// A connection without a request is closed after this.
const IDLE: Duration = Duration::from_secs(30);
/// Longest request in bytes.
const REQUEST_MAX: usize = 1 << 20;
/// Longest reply in bytes.
const REPLY_MAX: usize = 1 << 28;
/// Longest path that the system takes as a socket's address, on any system.
const ADDRESS_MAX: usize = 100;

/// Why a request was not answered.
#[derive(Serialize, Deserialize)]
struct Refusal {
    /// Whether the job has ended, so that its store answers.
    ended: bool,
    kind: ErrorKind,
    message: String,
}

impl From<Error> for Refusal {
    fn from(e: Error) -> Self {
        Self { ended: matches!(e, Error::Ended), kind: e.kind(), message: e.to_string() }
    }
}

/// The address of a directory's socket. A path that is too long for an address is replaced by one through the open
/// directory, which must stay open while the address is used.
struct Address {
    path: PathBuf,
    _directory: Option<File>,
}

impl Address {
    fn of(directory: &Path) -> io::Result<Self> {
        let path = directory.join(SOCKET_FILE);
        if path.as_os_str().len() <= ADDRESS_MAX {
            return Ok(Self { path, _directory: None });
        }
        let open = File::open(directory)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{SOCKET_FILE}", open.as_raw_fd()));
        Ok(Self { path, _directory: Some(open) })
    }
}

/// The running server; dropping it stops it and removes the socket.
pub(crate) struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_file(&self.path); // the next job replaces one that stays
    }
}

/// Serves the socket of a job, whose store must be locked: a socket that is there was left by a process that was killed.
/// Only the user who runs the job, and root, are answered.
pub(crate) async fn serve(live: Live, directory: &Path) -> Result<Server> {
    let path = directory.join(SOCKET_FILE);
    let owned: PathBuf = directory.into();
    let (listener, owner) = blocking(move || -> io::Result<_> {
        let socket = owned.join(SOCKET_FILE);
        match fs::remove_file(&socket) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(&Address::of(&owned)?.path)?;
        listener.set_nonblocking(true)?;
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o600))?;
        Ok((listener, fs::metadata(&socket)?.uid()))
    })
    .await
    .at(&path)?;
    let listener = UnixListener::from_std(listener).at(&path)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let task = tokio::spawn(async move {
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, most likely.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let trusted = stream.peer_cred().is_ok_and(|peer| peer.uid() == owner || peer.uid() == 0);
            if trusted {
                let live = live.clone();
                tokio::spawn(async move {
                    let _place = place;
                    converse(&live, stream).await;
                });
            }
        }
    });
    Ok(Server { path, task })
}

/// Answers the requests of one connection until it closes, is idle, or says what is no request.
async fn converse(live: &Live, stream: UnixStream) {
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(REQUEST_MAX));
    while let Ok(Some(line)) = timeout(IDLE, lines.next()).await {
        let request = line.map_err(|e| e.to_string()).and_then(|line| parse(&line));
        let is_request = request.is_ok();
        let reply = match request {
            Ok(request) => live.answer(request).await.map_err(Refusal::from),
            Err(message) => Err(Refusal { ended: false, kind: ErrorKind::Input, message }),
        };
        let Ok(text) = serde_json::to_string(&reply) else { return };
        if !matches!(timeout(IDLE, lines.send(text)).await, Ok(Ok(()))) || !is_request {
            return;
        }
    }
}

fn parse(line: &str) -> std::result::Result<Request, String> {
    serde_json::from_str(line).map_err(|e| format!("this is no request that this version of rehearsal knows: {e}"))
}

/// A connection to the process that runs a job; `None` if no process listens.
pub(crate) async fn connect(directory: &Path) -> Result<Option<UnixStream>> {
    let path = directory.join(SOCKET_FILE);
    let connected = match Address::of(directory) {
        Ok(address) => UnixStream::connect(&address.path).await,
        Err(e) => Err(e),
    };
    match connected {
        Ok(stream) => Ok(Some(stream)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
        Err(e) => Err(e).at(&path),
    }
}

/// Asks the process at the other end.
pub(crate) async fn ask(stream: UnixStream, directory: &Path, request: &Request) -> Result<Reply> {
    let lost = |reason: String| Error::Unreachable { directory: directory.into(), reason };
    let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(REPLY_MAX));
    let text = serde_json::to_string(request).map_err(|e| Error::Internal(e.to_string()))?;
    lines.send(text).await.map_err(|e| lost(e.to_string()))?;
    let line = lines.next().await.ok_or_else(|| lost("it closed the connection".into()))?;
    let line = line.map_err(|e| lost(e.to_string()))?;
    let reply: std::result::Result<Reply, Refusal> = serde_json::from_str(&line).map_err(|e| lost(e.to_string()))?;
    reply
        .map_err(|Refusal { ended, kind, message }| if ended { Error::Ended } else { Error::Refused { kind, message } })
}
