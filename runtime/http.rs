//! Bounded HTTP listeners: limits on connections.

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

use crate::listen::Bound;

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

/// A listener for `axum::serve` whose connections are limited in number, time and bytes received.
pub(crate) struct Bounded {
    listener: TcpListener,
    pub address: SocketAddr,
    limits: Limits,
    permits: Arc<Semaphore>,
}

impl Bounded {
    /// Limits the connections to a bound address.
    pub fn new(bound: Bound, limits: Limits) -> io::Result<Self> {
        let address = bound.address;
        let permits = Arc::new(Semaphore::new(limits.connections_max));
        Ok(Self { listener: bound.listener()?, address, limits, permits })
    }
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
