//! Versioned records with checksums: `[layout: 1][version: 1][checksum: 8][payload]` in bytes. A long payload is split
//! into parts under keys of their own, and the record holds the number of parts (4 bytes, big-endian) instead.
//!
//! sled keeps values above about 7 KiB in separate files that its flush does not sync, so parts are smaller.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::kv::{KeyValue, WriteBatch};
use crate::{Error, Result, key};

/// A kind of record: its name in messages, and the version that this program writes.
#[derive(Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    pub version: u8,
}

pub const JOB: Kind = Kind { name: "job state", version: 1 };
pub const CHECKPOINT: Kind = Kind { name: "checkpoint manifest", version: 1 };
pub const ROLLOUT: Kind = Kind { name: "rollout", version: 1 };
pub const SCORE: Kind = Kind { name: "score", version: 3 };
pub const REPLY: Kind = Kind { name: "judge's reply", version: 2 };
pub const LEDGER: Kind = Kind { name: "preference", version: 2 };

/// A type of record, with a decoder for each version of its encoding.
pub trait Record: DeserializeOwned {
    /// Decodes a payload of a version up to the current one.
    fn decode(_version: u8, bytes: &[u8]) -> postcard::Result<Self> {
        postcard::from_bytes(bytes)
    }
}

/// A record of any serializable type, with a single version.
#[derive(Deserialize)]
#[serde(transparent)]
pub struct Plain<T>(pub T);

impl<T: DeserializeOwned> Record for Plain<T> {}

/// Largest size of a value in bytes.
pub const PART_BYTES: usize = 6 * 1024;

const WHOLE: u8 = 0;
const SPLIT: u8 = 1;
const HEADER: usize = 10;

/// Adds the writes of a record to `batch`.
pub fn put<T: Serialize>(batch: &mut WriteBatch, key: Vec<u8>, kind: Kind, value: &T) -> Result<()> {
    let payload = postcard::to_stdvec(value).map_err(|e| Error::Encode(e.to_string()))?;
    let header = |layout: u8| {
        let mut bytes = vec![layout, kind.version];
        bytes.extend_from_slice(&checksum(kind.version, &payload));
        bytes
    };
    if payload.len() + HEADER <= PART_BYTES {
        let mut bytes = header(WHOLE);
        bytes.extend_from_slice(&payload);
        batch.put(key, bytes);
        return Ok(());
    }
    let mut bytes = header(SPLIT);
    bytes.extend_from_slice(&(payload.len().div_ceil(PART_BYTES) as u32).to_be_bytes());
    for (i, part) in payload.chunks(PART_BYTES).enumerate() {
        batch.put(key::part(&key, i as u32), part.to_vec());
    }
    batch.put(key, bytes);
    Ok(())
}

/// Adds the removal of a record and its parts to `batch`.
pub fn remove(kv: &dyn KeyValue, batch: &mut WriteBatch, key: Vec<u8>) -> Result<()> {
    if let Some(value) = kv.get(&key)? {
        for i in 0..parts(&value) {
            batch.remove(key::part(&key, i));
        }
        batch.remove(key);
    }
    Ok(())
}

/// Reads a record.
pub fn get<T: Record>(kv: &dyn KeyValue, key: &[u8], kind: Kind) -> Result<Option<T>> {
    match kv.get(key)? {
        Some(value) => decode(kv, key, &value, kind).map(Some),
        None => Ok(None),
    }
}

/// Decodes a value found under `key`.
pub fn decode<T: Record>(kv: &dyn KeyValue, key: &[u8], value: &[u8], kind: Kind) -> Result<T> {
    let what = || format!("{} {}", kind.name, name(key));
    let (version, payload) = payload(kv, key, value)?;
    if version > kind.version {
        return Err(Error::TooNew { what: what(), found: version, known: kind.version });
    }
    T::decode(version, &payload).map_err(|e| Error::Corrupt { what: what(), reason: e.to_string() })
}

/// Verifies a value's checksum without decoding it.
pub fn check(kv: &dyn KeyValue, key: &[u8], value: &[u8]) -> Result<()> {
    payload(kv, key, value).map(|_| ())
}

fn payload(kv: &dyn KeyValue, key: &[u8], value: &[u8]) -> Result<(u8, Vec<u8>)> {
    let corrupt = |reason: &str| Error::Corrupt { what: format!("record {}", name(key)), reason: reason.into() };
    if value.len() < HEADER {
        return Err(corrupt("it is too short"));
    }
    let (version, sum) = (value[1], &value[2..HEADER]);
    let payload = match value[0] {
        WHOLE => value[HEADER..].to_vec(),
        SPLIT => {
            let mut payload = Vec::new();
            for i in 0..parts(value) {
                payload.extend(kv.get(&key::part(key, i))?.ok_or_else(|| corrupt("a part is missing"))?);
            }
            payload
        }
        _ => return Err(corrupt("its layout is unknown")),
    };
    if checksum(version, &payload) != sum {
        return Err(corrupt("its checksum does not match"));
    }
    Ok((version, payload))
}

fn parts(value: &[u8]) -> u32 {
    match (value.first(), value.get(HEADER..HEADER + 4)) {
        (Some(&SPLIT), Some(n)) => n.try_into().map_or(0, u32::from_be_bytes),
        _ => 0,
    }
}

fn checksum(version: u8, payload: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[version]).update(payload);
    let mut sum = [0; 8];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    sum
}

/// A key in readable form, for messages.
pub fn name(key: &[u8]) -> String {
    let letter = key.first().map_or('?', |&c| c as char);
    match crate::key::step_of(key) {
        Some(step) if letter != 'j' => format!("{letter}/{step}"),
        _ => String::from_utf8_lossy(key).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryKv;

    fn written(value: &Vec<u8>) -> MemoryKv {
        let mut kv = MemoryKv::default();
        let mut batch = WriteBatch::default();
        put(&mut batch, b"j/x".to_vec(), JOB, value).unwrap();
        kv.apply(batch).unwrap();
        kv
    }

    #[test]
    fn short_and_long_records_are_read_and_removed() {
        for len in [0, 10, PART_BYTES - 20, PART_BYTES, 5 * PART_BYTES + 1] {
            let value: Vec<u8> = (0..len).map(|i| i as u8).collect();
            let mut kv = written(&value);
            assert_eq!(get::<Plain<Vec<u8>>>(&kv, b"j/x", JOB).unwrap().unwrap().0, value);
            let mut batch = WriteBatch::default();
            remove(&kv, &mut batch, b"j/x".to_vec()).unwrap();
            kv.apply(batch).unwrap();
            assert_eq!(kv.scan(b"").unwrap().count(), 0);
        }
    }

    #[test]
    fn every_flipped_byte_is_detected() {
        let kv = written(&vec![7; 50]);
        let value = kv.get(b"j/x").unwrap().unwrap();
        for at in 0..value.len() {
            let mut flipped = value.clone();
            flipped[at] ^= 0x40;
            let result: Result<Plain<Vec<u8>>> = decode(&kv, b"j/x", &flipped, JOB);
            assert!(matches!(result, Err(Error::Corrupt { .. } | Error::TooNew { .. })), "byte {at}");
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut kv = MemoryKv::default();
        let mut batch = WriteBatch::default();
        put(&mut batch, b"j/x".to_vec(), Kind { version: 2, ..JOB }, &1u8).unwrap();
        kv.apply(batch).unwrap();
        let error = get::<Plain<u8>>(&kv, b"j/x", JOB).err().unwrap().to_string();
        assert!(error.contains("newer version"), "{error}");
    }
}
