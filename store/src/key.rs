//! Keys of the database: a letter for the kind of record, a slash, then big-endian numbers, so that scans are in the order
//! of steps.

pub const CHECKPOINT: &[u8] = b"c/";
pub const ROLLOUT: &[u8] = b"r/";
pub const SCORE: &[u8] = b"v/";
pub const LEDGER: &[u8] = b"l/";
const PROMPT_INDEX: &[u8] = b"i/";

fn with(prefix: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    std::iter::once(&prefix).chain(parts).flat_map(|p| p.iter().copied()).collect()
}

pub fn job(name: &str) -> Vec<u8> {
    with(b"j/", &[name.as_bytes()])
}

/// A judge's cached reply, by the hash of the request.
pub fn reply(hash: &str) -> Vec<u8> {
    job(&format!("judge/{hash}"))
}

pub fn checkpoint(step: u64) -> Vec<u8> {
    with(CHECKPOINT, &[&step.to_be_bytes()])
}

/// Prefix of all records of a kind in a step.
pub fn step(kind: &[u8], step: u64) -> Vec<u8> {
    with(kind, &[&step.to_be_bytes()])
}

/// The `index`-th record of a kind in a step.
pub fn item(kind: &[u8], step: u64, index: u32) -> Vec<u8> {
    with(kind, &[&step.to_be_bytes(), &index.to_be_bytes()])
}

/// The step of a key made by [`step`], [`item`] or [`checkpoint`].
pub fn step_of(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(2..10)?.try_into().ok()?))
}

/// Prefix of the index entries of a prompt.
pub fn prompt(hash: &[u8; 32]) -> Vec<u8> {
    with(PROMPT_INDEX, &[&hash[..16]])
}

/// The index entry that points from a prompt to a ledger entry.
pub fn prompt_item(hash: &[u8; 32], step: u64, index: u32) -> Vec<u8> {
    with(&prompt(hash), &[&step.to_be_bytes(), &index.to_be_bytes()])
}

/// The ledger key that an index entry points to.
pub fn indexed(key: &[u8]) -> Vec<u8> {
    with(LEDGER, &[&key[key.len() - 12..]])
}

/// Whether a key is an index entry, which has no value.
pub fn is_index(key: &[u8]) -> bool {
    key.starts_with(PROMPT_INDEX)
}

/// The `part`-th piece of a long record.
pub fn part(of: &[u8], part: u32) -> Vec<u8> {
    with(b"#", &[of, &part.to_be_bytes()])
}

/// The `part`-th piece of a shard kept in the database.
pub fn shard_part(hash: &str, part: u32) -> Vec<u8> {
    with(&shard(hash), &[&part.to_be_bytes()])
}

/// Prefix of the pieces of a shard kept in the database.
pub fn shard(hash: &str) -> Vec<u8> {
    with(b"t/", &[hash.as_bytes(), b"/"])
}
