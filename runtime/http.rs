//! Bounded HTTP listeners: binding with errors that say what to do, and limits on connections.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

use crate::error::{Error, Result};

/// Limits of a listener and of each connection to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Connections open at a time; further ones wait in the kernel's backlog.
    pub connections_max: usize,
    /// Time a connection may stay open, from its acceptance.
    pub connection: Duration,
    /// Bytes that a client may send over one connection, headers and bodies together.
    pub received_bytes_max: usize,
}

/// Binds an address. `what` is the service and `key` the setting that chose the address; an error names both.
pub(crate) async fn bind(what: &'static str, key: &str, address: SocketAddr, limits: Limits) -> Result<Bounded> {
    let refused = |e| Error::Listen { what, address, reason: explain(&e, key) };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    Ok(Bounded { listener, address, limits, permits: Arc::new(Semaphore::new(limits.connections_max)) })
}

fn explain(error: &io::Error, key: &str) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("another process listens there; stop it, or set `{key}` to a free port (`127.0.0.1:0` takes any)")
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("this machine has no such address; set `{key}` to 127.0.0.1 or 0.0.0.0 and a port")
        }
        io::ErrorKind::PermissionDenied => {
            format!("the system does not permit it; set `{key}` to a port of 1024 or more")
        }
        _ => error.to_string(),
    }
}

/// A listener for `axum::serve` whose connections are limited in number, time and bytes received.
pub(crate) struct Bounded {
    listener: TcpListener,
    pub address: SocketAddr,
    limits: Limits,
    permits: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // The semaphore is never closed, so a permit is always granted in the end.
        let permit = self.permits.clone().acquire_owned().await.ok();
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        let deadline = Box::pin(tokio::time::sleep(self.limits.connection));
        (Connection { stream, deadline, bytes_left: self.limits.received_bytes_max, _permit: permit }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// A connection that fails once its time is over or its client has sent too much.
pub(crate) struct Connection {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    bytes_left: usize,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// An error once the deadline has passed; otherwise the task is woken when it does.
    fn check_deadline(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check_deadline(cx)?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let received = buf.filled().len() - before;
        match self.bytes_left.checked_sub(received) {
            Some(left) => self.bytes_left = left,
            None => return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "the request is too long"))),
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_deadline(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_deadline(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_deadline(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
