//! Processes that share the members of trained models: rank 0 has the roles of the job, the others answer it.
//!
//! Rank 0 sends each rank what it asks for (`message.rs`) and does its own part meanwhile (`peers.rs`); the ranks answer in a loop
//! (`serve.rs`). Gradients and weights go from all to all (`exchange.rs`). What carries the messages is a [`Wire`].

mod exchange;
mod launched;
mod memory;
mod message;
#[cfg(feature = "mpi")]
mod mpi;
mod peers;
mod serve;
mod tensors;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, MutexGuard};

pub(crate) use self::exchange::Exchange;
pub use self::launched::{launched_ranks, threads_of_rank};
pub use self::memory::wires;
use self::message::Request;
#[cfg(feature = "mpi")]
pub use self::mpi::MpiWire;
pub(crate) use self::peers::Peers;
pub use self::serve::serve;

/// Carries messages between the ranks `0..size`. Messages from one rank to another arrive in order, whole and once; a failure ends the
/// process, and with it all ranks, as MPI does it.
pub trait Wire: Send {
    /// This process's rank.
    fn rank(&self) -> usize;

    /// Number of ranks; 1 or more.
    fn size(&self) -> usize;

    /// Sends a message. It may wait until the receiver takes it.
    fn send(&self, to: usize, message: &[u8]);

    /// The next message from a rank, if it has arrived.
    fn try_receive(&self, from: usize) -> Option<Vec<u8>>;

    /// Sends a vector to each rank, itself included, and receives one from each: `counts` are their lengths. All ranks call it
    /// together.
    fn all_to_all(&self, send: &[Vec<f32>], counts: &[usize]) -> Vec<Vec<f32>>;

    /// Sends a vector to all ranks, and receives those of all: `counts` are their lengths. All ranks call it together.
    fn all_gather(&self, own: &[f32], counts: &[usize]) -> Vec<Vec<f32>>;
}

/// A connection that was closed: what is sent goes nowhere, and nothing arrives.
struct Closed;

impl Wire for Closed {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn send(&self, _: usize, _: &[u8]) {}

    fn try_receive(&self, _: usize) -> Option<Vec<u8>> {
        None
    }

    fn all_to_all(&self, _: &[Vec<f32>], _: &[usize]) -> Vec<Vec<f32>> {
        Vec::new()
    }

    fn all_gather(&self, _: &[f32], _: &[usize]) -> Vec<Vec<f32>> {
        Vec::new()
    }
}

/// Rank 0's connection to the other ranks. Clones share it; one request to all is under way at a time.
#[derive(Clone)]
pub struct Ranks {
    wire: Arc<Mutex<Box<dyn Wire>>>,
    size: usize,
    models: Arc<AtomicU32>,
}

impl Ranks {
    /// The ranks of a wire, for rank 0. The others must be in [`serve`].
    pub fn new(wire: Box<dyn Wire>) -> Self {
        let size = wire.size();
        Self { wire: Arc::new(Mutex::new(wire)), size, models: Arc::default() }
    }

    /// Number of ranks, this one included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Tells all ranks to end, and closes the connection to them. A role that ends later sends them nothing any more.
    pub fn stop(&self) {
        let mut wire = self.wire();
        for rank in 1..self.size {
            message::send(&**wire, rank, &Request::Stop);
        }
        *wire = Box::new(Closed);
    }

    fn wire(&self) -> MutexGuard<'_, Box<dyn Wire>> {
        self.wire.lock()
    }

    /// A number for a model that has members in all ranks.
    fn next_model(&self) -> u32 {
        self.models.fetch_add(1, Ordering::Relaxed)
    }
}
