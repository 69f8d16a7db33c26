//! Binding of addresses, with errors that say what to do.

use std::io;
use std::net::{SocketAddr, TcpListener};

use crate::error::{Error, Result};

/// An address that is bound and not yet served: connections wait.
pub(crate) struct Bound {
    listener: TcpListener,
    /// The address, with the port that was assigned if the setting's was 0.
    pub address: SocketAddr,
}

/// Binds an address. `what` is the service and `key` the setting that chose the address; an error names both.
pub(crate) fn bind(what: &'static str, key: &str, address: SocketAddr) -> Result<Bound> {
    let refused = |e| Error::Listen { what, address, reason: explain(&e, key) };
    let listener = TcpListener::bind(address).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    Ok(Bound { listener, address })
}

impl Bound {
    /// The listener, within a tokio runtime.
    pub fn listener(self) -> io::Result<tokio::net::TcpListener> {
        tokio::net::TcpListener::from_std(self.listener)
    }
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
