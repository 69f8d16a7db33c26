//! Ranks of an MPI program.

use mpi::Threading;
use mpi::datatype::{Partition, PartitionMut};
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

use super::Wire;
use crate::{Error, Result};

/// Bytes of a message that go in one call: MPI counts in 31 bits.
const PART: usize = 1 << 30;

/// The ranks of `MPI_COMM_WORLD`.
pub struct MpiWire {
    world: SimpleCommunicator,
    /// Finalizes MPI when it is dropped.
    _universe: Universe,
}

// SAFETY: MPI was initialised to be called by one thread at a time (`Threading::Serialized`), and `&self` is only reachable by
// one: `Ranks` holds the wire behind a lock, and `serve` has it alone.
unsafe impl Send for MpiWire {}

impl MpiWire {
    /// Initialises MPI.
    ///
    /// # Errors
    ///
    /// [`Error::Start`] if MPI is initialised already, or does not allow calls from several threads.
    pub fn new() -> Result<Self> {
        let failed = |reason: &str| Error::Start { role: "MPI", reason: reason.into() };
        let (universe, provided) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| failed("it is initialised already; one job of a process can use it"))?;
        if provided < Threading::Serialized {
            return Err(failed("this MPI cannot be called from several threads (MPI_THREAD_SERIALIZED)"));
        }
        Ok(Self { world: universe.world(), _universe: universe })
    }
}

/// The offsets of parts that lie one after the other, and their lengths, as MPI counts.
fn places(counts: &[usize]) -> (Vec<i32>, Vec<i32>) {
    let mut at = 0;
    let offset = |count: &usize| {
        let offset = at;
        at += *count as i32;
        offset
    };
    let offsets = counts.iter().map(offset).collect();
    (counts.iter().map(|count| *count as i32).collect(), offsets)
}

fn parts(all: &[f32], counts: &[usize]) -> Vec<Vec<f32>> {
    let mut rest = all;
    let mut next = |count: &usize| {
        let (part, others) = rest.split_at(*count);
        rest = others;
        part.to_vec()
    };
    counts.iter().map(&mut next).collect()
}

impl Wire for MpiWire {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn send(&self, to: usize, message: &[u8]) {
        let to = self.world.process_at_rank(to as i32);
        // The length goes ahead, since a long message goes in parts.
        to.send(&(message.len() as u64));
        message.chunks(PART).for_each(|part| to.send(part));
    }

    fn try_receive(&self, from: usize) -> Option<Vec<u8>> {
        let from = self.world.process_at_rank(from as i32);
        let (message, _) = from.immediate_matched_probe()?;
        let (length, _) = message.matched_receive::<u64>();
        let mut bytes = vec![0u8; length as usize];
        bytes.chunks_mut(PART).for_each(|part| {
            from.receive_into(part);
        });
        Some(bytes)
    }

    fn all_to_all(&self, send: &[Vec<f32>], counts: &[usize]) -> Vec<Vec<f32>> {
        let lengths: Vec<usize> = send.iter().map(Vec::len).collect();
        let (all, (own_counts, own_offsets)) = (send.concat(), places(&lengths));
        let (their_counts, their_offsets) = places(counts);
        let mut received = vec![0.0f32; counts.iter().sum()];
        self.world.all_to_all_varcount_into(
            &Partition::new(&all[..], own_counts, own_offsets),
            &mut PartitionMut::new(&mut received[..], their_counts, their_offsets),
        );
        parts(&received, counts)
    }

    fn all_gather(&self, own: &[f32], counts: &[usize]) -> Vec<Vec<f32>> {
        let (their_counts, their_offsets) = places(counts);
        let mut received = vec![0.0f32; counts.iter().sum()];
        let mut places = PartitionMut::new(&mut received[..], their_counts, their_offsets);
        self.world.all_gather_varcount_into(own, &mut places);
        parts(&received, counts)
    }
}
