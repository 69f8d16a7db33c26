//! Ranks in one process, for tests: messages go through channels.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};

use parking_lot::Mutex;

use super::Wire;

/// One end of the wires between ranks of this process.
struct MemoryWire {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
    /// What all send to all together does not mix with messages.
    together_to: Vec<Sender<Vec<f32>>>,
    together_from: Vec<Mutex<Receiver<Vec<f32>>>>,
}

/// Wires between `size` ranks of this process, by rank.
pub fn wires(size: usize) -> Vec<Box<dyn Wire>> {
    let (mut to, mut from) = channels(size);
    let (mut together_to, mut together_from) = channels(size);
    let mut wire = |rank| MemoryWire {
        rank,
        to: to.pop_front().unwrap_or_default(),
        from: from.pop_front().unwrap_or_default(),
        together_to: together_to.pop_front().unwrap_or_default(),
        together_from: together_from.pop_front().unwrap_or_default(),
    };
    (0..size).map(|rank| Box::new(wire(rank)) as Box<dyn Wire>).collect()
}

type Ends<T> = (VecDeque<Vec<Sender<T>>>, VecDeque<Vec<Mutex<Receiver<T>>>>);

/// A channel from each rank to each: senders by sender, receivers by receiver.
fn channels<T>(size: usize) -> Ends<T> {
    let mut senders: VecDeque<Vec<Sender<T>>> = (0..size).map(|_| Vec::new()).collect();
    let mut receivers: VecDeque<Vec<Mutex<Receiver<T>>>> = (0..size).map(|_| Vec::new()).collect();
    for sender in senders.iter_mut() {
        for receiver in receivers.iter_mut() {
            let (send, receive) = channel();
            sender.push(send);
            receiver.push(Mutex::new(receive));
        }
    }
    (senders, receivers)
}

impl MemoryWire {
    fn together(&self, send: impl Fn(usize) -> Vec<f32>, counts: &[usize]) -> Vec<Vec<f32>> {
        for (rank, to) in self.together_to.iter().enumerate() {
            let _ = to.send(send(rank)); // a rank that has ended receives nothing
        }
        let received = self.together_from.iter().map(|from| from.lock().recv().unwrap_or_default());
        let received: Vec<Vec<f32>> = received.collect();
        debug_assert!(received.iter().map(Vec::len).eq(counts.iter().copied()));
        received
    }
}

impl Wire for MemoryWire {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn send(&self, to: usize, message: &[u8]) {
        let _ = self.to[to].send(message.to_vec()); // a rank that has ended receives nothing
    }

    fn try_receive(&self, from: usize) -> Option<Vec<u8>> {
        self.from[from].lock().try_recv().ok()
    }

    fn all_to_all(&self, send: &[Vec<f32>], counts: &[usize]) -> Vec<Vec<f32>> {
        self.together(|rank| send[rank].clone(), counts)
    }

    fn all_gather(&self, own: &[f32], counts: &[usize]) -> Vec<Vec<f32>> {
        self.together(|_| own.to_vec(), counts)
    }
}
