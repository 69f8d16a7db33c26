//! The binary header of a checkpoint's state: the counters of each model, in front of the job's own state.
//!
//! Layout: number of models (one byte); then for each model, in the order of names, the length of its name (one byte),
//! the name in UTF-8, its version and its optimizer steps (8 bytes each, big-endian); then the job's state to the end.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// Counters of a trained model at a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelCounters {
    /// Number of updates of the weights.
    pub version: u64,
    /// Steps of the optimizer, from which its bias correction follows.
    pub optimizer_steps: u64,
}

/// Counters of the trained models of a checkpoint by model name.
pub type Models = BTreeMap<String, ModelCounters>;

/// Encodes the counters and the job's state.
pub fn encode(models: &Models, job: &[u8]) -> Result<Vec<u8>> {
    let byte = |what: &str, n: usize| {
        u8::try_from(n).map_err(|_| Error::Encode(format!("a checkpoint's {what} is {n}, and 255 is the most")))
    };
    let mut bytes = vec![byte("number of models", models.len())?];
    for (name, counters) in models {
        bytes.push(byte("length of a model's name", name.len())?);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(&counters.version.to_be_bytes());
        bytes.extend_from_slice(&counters.optimizer_steps.to_be_bytes());
    }
    bytes.extend_from_slice(job);
    Ok(bytes)
}

/// Decodes what [`encode`] wrote; `None` if the bytes end too early or a name is not UTF-8.
pub fn decode(bytes: &[u8]) -> Option<(Models, Vec<u8>)> {
    let (&count, mut rest) = bytes.split_first()?;
    let mut models = Models::new();
    for _ in 0..count {
        let (&length, after) = rest.split_first()?;
        let (name, after) = after.split_at_checked(usize::from(length))?;
        let (version, after) = after.split_first_chunk()?;
        let (steps, after) = after.split_first_chunk()?;
        let (version, optimizer_steps) = (u64::from_be_bytes(*version), u64::from_be_bytes(*steps));
        models.insert(String::from_utf8(name.to_vec()).ok()?, ModelCounters { version, optimizer_steps });
        rest = after;
    }
    Some((models, rest.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A checkpoint's state as it is on disk: two models and the job's state `job`.
    const BYTES: &[u8] = b"\x02\x06critic\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\x01\x04\
        \x06policy\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x08job";

    fn models() -> Models {
        let of = |version, optimizer_steps| ModelCounters { version, optimizer_steps };
        Models::from([("policy".into(), of(7, 8)), ("critic".into(), of(3, 260))])
    }

    #[test]
    fn the_bytes_on_disk_do_not_change() {
        assert_eq!(encode(&models(), b"job").unwrap(), BYTES);
        assert_eq!(decode(BYTES), Some((models(), b"job".to_vec())));
        assert_eq!(encode(&Models::new(), b"").unwrap(), [0]);
        assert_eq!(decode(&[0]), Some((Models::new(), Vec::new())));
    }

    #[test]
    fn a_header_that_ends_too_early_is_refused() {
        for end in 0..BYTES.len() - b"job".len() {
            assert_eq!(decode(&BYTES[..end]), None, "{end} bytes");
        }
        assert_eq!(decode(b"\x01\x01\xff\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"), None, "a name that is not UTF-8");
        let error = encode(&Models::from([("x".repeat(256), ModelCounters::default())]), b"").unwrap_err();
        assert!(error.to_string().contains("256"), "{error}");
    }
}
