//! Frames: batches of writes with a number and a checksum, one after another in a file. A damaged frame does not hide the
//! ones after it.
//!
//! Layout: `[magic: 4][length of the payload: 4][number: 8][checksum: 8][payload]`, numbers big-endian. The checksum is the
//! beginning of the blake3 hash of length, number and payload. The payload is a postcard-encoded list of keys with values,
//! or none where a key is removed.

use std::ops::Range;

use crate::kv::WriteBatch;
use crate::{Error, Result};

const MAGIC: [u8; 4] = *b"RhF1";
const HEADER: usize = 24;

/// A frame of a batch.
pub fn encode(number: u64, batch: &WriteBatch) -> Result<Vec<u8>> {
    let payload = postcard::to_stdvec(&batch.0).map_err(|e| Error::Encode(e.to_string()))?;
    let len = u32::try_from(payload.len())
        .map_err(|_| Error::Encode(format!("a batch of {} bytes is too large", payload.len())))?;
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&len.to_be_bytes());
    frame.extend_from_slice(&number.to_be_bytes());
    frame.extend_from_slice(&checksum(len, number, &payload));
    frame.extend_from_slice(&payload);
    Ok(frame)
}

fn checksum(len: u32, number: u64, payload: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_be_bytes()).update(&number.to_be_bytes()).update(payload);
    let mut sum = [0; 8];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    sum
}

/// An intact frame in a file.
pub struct Frame {
    pub number: u64,
    payload: Range<usize>,
}

impl Frame {
    /// The batch; `None` if it is not one that this build writes.
    pub fn batch(&self, file: &[u8]) -> Option<WriteBatch> {
        postcard::from_bytes(&file[self.payload.clone()]).ok().map(WriteBatch)
    }
}

/// The frames of a file.
#[derive(Default)]
pub struct Frames {
    pub intact: Vec<Frame>,
    /// Where something lies between two frames, or before the first, that is none.
    pub damaged: Vec<Range<usize>>,
    /// End of the last intact frame.
    pub end: usize,
}

impl Frames {
    /// Finds the frames of a file, from `start` on.
    pub fn read(file: &[u8], start: usize) -> Self {
        let mut frames = Self { end: start, ..Self::default() };
        let mut at = start;
        while at + HEADER <= file.len() {
            let Some(frame) = parse(file, at) else {
                let next = file[at + 1..].windows(MAGIC.len()).position(|window| window == MAGIC);
                let Some(next) = next else { break };
                at += 1 + next;
                continue;
            };
            if at > frames.end {
                frames.damaged.push(frames.end..at);
            }
            at = frame.payload.end;
            frames.end = at;
            frames.intact.push(frame);
        }
        frames
    }
}

fn parse(file: &[u8], at: usize) -> Option<Frame> {
    let header = file.get(at..at + HEADER)?;
    let field = |range: Range<usize>| header.get(range);
    if header[..4] != MAGIC {
        return None;
    }
    let len = u32::from_be_bytes(field(4..8)?.try_into().ok()?);
    let number = u64::from_be_bytes(field(8..16)?.try_into().ok()?);
    let start = at + HEADER;
    let payload = start..start.checked_add(len as usize)?;
    let intact = checksum(len, number, file.get(payload.clone())?) == header[16..24];
    intact.then_some(Frame { number, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(n: u8) -> WriteBatch {
        let mut batch = WriteBatch::default();
        batch.put(vec![n], vec![n; usize::from(n)]);
        batch.remove(vec![n, n]);
        batch
    }

    #[test]
    fn damage_hides_one_frame_alone() {
        let frames: Vec<Vec<u8>> = (0..5u8).map(|n| encode(u64::from(n), &batch(n)).unwrap()).collect();
        let whole = frames.concat();
        let read = Frames::read(&whole, 0);
        assert_eq!((read.intact.len(), read.damaged.len(), read.end), (5, 0, whole.len()));
        for (n, frame) in read.intact.iter().enumerate() {
            assert_eq!(frame.batch(&whole).unwrap().0, batch(n as u8).0);
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            let read = Frames::read(&damaged, 0);
            let last = at >= whole.len() - frames[4].len();
            assert_eq!((read.intact.len(), read.damaged.len()), (4, usize::from(!last)), "byte {at}");
            let cut = Frames::read(&whole[..at], 0);
            assert!(cut.end <= at && cut.damaged.is_empty());
        }
    }
}
