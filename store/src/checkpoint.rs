//! Checkpoints: a manifest in the database and tensors in shards, which are files. A copy of the manifest lies beside the
//! shards, from which a lost database is rebuilt.

use std::collections::{BTreeMap, BTreeSet};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use crate::header::{self, ModelCounters};
use crate::kv::WriteBatch;
use crate::{Error, Repair, Result, Store, key, record};

/// Smallest size of a shard, except for the last one of a checkpoint.
const SHARD_BYTES_MIN: usize = 64 << 20;

/// A tensor to be stored.
#[derive(Debug, Clone)]
pub struct TensorBytes<'a> {
    /// Name of the parameter or moment.
    pub name: String,
    /// Name of the element type in safetensors: `F32`, `BF16`, …
    pub dtype: &'static str,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements in row-major order, little-endian.
    pub data: &'a [u8],
}

/// A tensor read from the store.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedTensor {
    /// Name of the parameter or moment.
    pub name: String,
    /// Name of the element type in safetensors: `F32`, `BF16`, …
    pub dtype: String,
    /// Sizes of the dimensions.
    pub shape: Vec<usize>,
    /// Elements in row-major order, little-endian.
    pub data: Vec<u8>,
}

/// A checkpoint without its tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointSummary {
    /// Step after which it was saved.
    pub step: u64,
    /// Size of its shards.
    pub bytes: u64,
    /// Number of tensors.
    pub tensors: usize,
}

/// A checkpoint read from the store, with all checksums verified.
#[derive(Debug)]
pub struct LoadedCheckpoint {
    /// Step after which it was saved.
    pub step: u64,
    /// Counters of the trained models by model name.
    pub models: BTreeMap<String, ModelCounters>,
    /// The job's own state, as it was saved.
    pub state: Vec<u8>,
    /// Tensors in the order of names.
    pub tensors: Vec<OwnedTensor>,
}

/// What was written for a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SavedCheckpoint {
    /// Bytes of shards written.
    pub written: u64,
    /// Bytes of shards that an earlier checkpoint had written.
    pub shared: u64,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    step: u64,
    shards: Vec<Shard>,
    tensors: u32,
    /// The models' counters and the job's state, encoded by [`header`].
    state: Vec<u8>,
}

impl record::Record for Manifest {}

#[derive(Serialize, Deserialize)]
struct Shard {
    hash: String,
    bytes: u64,
    /// Whether it is in the database and not in a file, as builds before version 0.2 kept small checkpoints.
    inline: bool,
}

/// Which checkpoints stay when one is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// The newest; at least one stays.
    pub newest: usize,
    /// Those of steps that this divides stay for good; 0 for none.
    pub every: u64,
}

impl From<usize> for Keep {
    fn from(newest: usize) -> Self {
        Self { newest, every: 0 }
    }
}

impl Store {
    /// Saves a checkpoint, and deletes all but those to `keep` and the rollouts and scores of steps before the newest of those. It
    /// is visible only once it is complete.
    ///
    /// `models` are the counters of the trained models by name, `state` is the job's own state.
    ///
    /// # Errors
    ///
    /// [`Error::NotFinite`] if a tensor holds a NaN or an infinity; [`Error::DiskFull`] and other I/O errors;
    /// [`Error::Encode`] for a tensor of an unknown type or a model name of more than 255 bytes. The earlier checkpoints
    /// are intact after each of them.
    pub fn save_checkpoint(
        &mut self,
        step: u64,
        models: &BTreeMap<String, ModelCounters>,
        tensors: &[TensorBytes<'_>],
        state: &[u8],
        keep: impl Into<Keep>,
    ) -> Result<SavedCheckpoint> {
        if let Some(tensor) = tensors.iter().find(|t| !is_finite(t)) {
            return Err(Error::NotFinite { step, tensor: tensor.name.clone() });
        }
        let state = header::encode(models, state)?;
        let mut saved = SavedCheckpoint::default();
        let mut shards = Vec::new();
        for group in shard_groups(tensors) {
            let bytes = serialize(group)?;
            let hash = blake3::hash(&bytes).to_hex().to_string();
            let size = bytes.len() as u64;
            *if self.shards.write(&hash, &bytes)? { &mut saved.written } else { &mut saved.shared } += size;
            shards.push(Shard { hash, bytes: size, inline: false });
        }
        let manifest = Manifest { step, shards, tensors: tensors.len() as u32, state };
        // The journal has the manifest; a copy that a power loss has torn is no worse than none.
        self.shards.write_named(&copy_name(step), &manifest_copy(&manifest)?)?;
        self.shards.sync()?;
        let mut batch = WriteBatch::default();
        record::put(&mut batch, key::checkpoint(step), record::CHECKPOINT, &manifest)?;
        let old = self.retire(&mut batch, manifest, keep.into())?;
        self.kv.apply(batch)?;
        // What the deleted manifests named goes once their deletion is durable.
        self.remove_files(&old)?;
        Ok(saved)
    }

    /// All checkpoints with an intact manifest, oldest first.
    pub fn checkpoints(&self) -> Result<Vec<CheckpointSummary>> {
        let manifests = self.manifests()?;
        Ok(manifests
            .iter()
            .map(|m| CheckpointSummary {
                step: m.step,
                bytes: m.shards.iter().map(|s| s.bytes).sum(),
                tensors: m.tensors as usize,
            })
            .collect())
    }

    /// Reads the checkpoint of a step.
    ///
    /// # Errors
    ///
    /// [`Error::NoCheckpoint`] if there is none, [`Error::Corrupt`] with the name of what is damaged.
    pub fn load_checkpoint(&self, step: u64) -> Result<LoadedCheckpoint> {
        let manifest: Manifest =
            record::get(&*self.kv, &key::checkpoint(step), record::CHECKPOINT)?.ok_or(Error::NoCheckpoint(step))?;
        let (models, state) = header::decode(&manifest.state).ok_or_else(|| Error::Corrupt {
            what: format!("checkpoint of step {step}"),
            reason: "its state ends within the header".into(),
        })?;
        let mut tensors = Vec::new();
        for shard in &manifest.shards {
            let bytes = if shard.inline { self.inline_shard(shard, step)? } else { self.shards.read(&shard.hash)? };
            let corrupt =
                |e: safetensors::SafeTensorError| Error::Corrupt { what: shard.hash.clone(), reason: e.to_string() };
            for (name, view) in SafeTensors::deserialize(&bytes).map_err(corrupt)?.tensors() {
                let dtype = dtype_name(view.dtype()).ok_or_else(|| Error::Corrupt {
                    what: format!("tensor `{name}` of the checkpoint of step {step}"),
                    reason: format!("its type {:?} is unknown", view.dtype()),
                })?;
                let (dtype, shape) = (dtype.to_string(), view.shape().to_vec());
                tensors.push(OwnedTensor { name, dtype, shape, data: view.data().to_vec() });
            }
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(LoadedCheckpoint { step, models, state, tensors })
    }

    /// Reads the newest undamaged checkpoint, if there is one, and a message for each newer one that is damaged.
    pub fn latest_checkpoint(&self) -> Result<(Option<LoadedCheckpoint>, Vec<Repair>)> {
        let mut damaged = Vec::new();
        for summary in self.checkpoints()?.iter().rev() {
            match self.load_checkpoint(summary.step) {
                Ok(checkpoint) => return Ok((Some(checkpoint), damaged)),
                Err(e @ Error::Corrupt { .. }) => {
                    damaged.push(Repair(format!("checkpoint of step {} is not used: {e}", summary.step)));
                }
                Err(e) => return Err(e),
            }
        }
        Ok((None, damaged))
    }

    fn manifests(&self) -> Result<Vec<Manifest>> {
        let mut all = Vec::new();
        for entry in self.kv.scan(key::CHECKPOINT)? {
            let (key, value) = entry?;
            match record::decode(&*self.kv, &key, &value, record::CHECKPOINT) {
                Ok(manifest) => all.push(manifest),
                Err(Error::Corrupt { .. }) => {} // reported by `Store::verify`; the others can be used
                Err(e) => return Err(e),
            }
        }
        Ok(all)
    }

    fn inline_shard(&self, shard: &Shard, step: u64) -> Result<Vec<u8>> {
        let corrupt =
            |reason: &str| Error::Corrupt { what: format!("checkpoint of step {step}"), reason: reason.into() };
        let mut bytes = Vec::with_capacity(shard.bytes as usize);
        for part in 0..(shard.bytes as usize).div_ceil(record::PART_BYTES) {
            let part = self.kv.get(&key::shard_part(&shard.hash, part as u32))?;
            bytes.extend(part.ok_or_else(|| corrupt("a part of its tensors is missing"))?);
        }
        if blake3::hash(&bytes).to_hex().as_str() != shard.hash {
            return Err(corrupt("its tensors do not match their checksum"));
        }
        Ok(bytes)
    }

    /// Adds to `batch` what is deleted when `newest` is saved: all manifests but it and the newest others, the tensors that
    /// only those had in the database, and the rollouts that no kept checkpoint is resumed with.
    fn retire(&self, batch: &mut WriteBatch, newest: Manifest, keep: Keep) -> Result<Retired> {
        let mut manifests = self.manifests()?;
        manifests.retain(|m| m.step != newest.step);
        manifests.push(newest);
        manifests.sort_by_key(|m| m.step);
        let mut kept = manifests.split_off(manifests.len().saturating_sub(keep.newest.max(1)));
        let oldest = kept.first().map(|m| m.step);
        let for_good = |m: &mut Manifest| keep.every > 0 && m.step.is_multiple_of(keep.every);
        kept.extend(manifests.extract_if(.., for_good));
        let used: BTreeSet<String> = kept.iter().flat_map(|m| &m.shards).map(|s| s.hash.clone()).collect();
        for manifest in &manifests {
            record::remove(&*self.kv, batch, key::checkpoint(manifest.step))?;
        }
        let inline = |manifests: &[Manifest]| -> BTreeMap<String, u64> {
            let shards = manifests.iter().flat_map(|m| &m.shards).filter(|s| s.inline);
            shards.map(|s| (s.hash.clone(), s.bytes)).collect()
        };
        let still = inline(&kept);
        for (hash, bytes) in inline(&manifests).iter().filter(|(hash, _)| !still.contains_key(*hash)) {
            for part in 0..(*bytes as usize).div_ceil(record::PART_BYTES) {
                batch.remove(key::shard_part(hash, part as u32));
            }
        }
        if let Some(oldest) = oldest {
            self.retire_rollouts(batch, oldest)?;
        }
        Ok(Retired { steps: manifests.iter().map(|m| m.step).collect(), used })
    }

    /// Deletes the files that retired checkpoints had and no other has.
    fn remove_files(&self, retired: &Retired) -> Result<()> {
        if retired.steps.is_empty() {
            return Ok(());
        }
        let names = self.shards.names()?;
        for name in retired.steps.iter().map(|step| copy_name(*step)).filter(|name| names.contains(name)) {
            self.shards.remove(&name)?;
        }
        self.shards.remove_unused(&retired.used)
    }

    /// Restores the manifests of a lost database from the copies beside the shards: those of checkpoints that are newer
    /// than the database's.
    pub(crate) fn restore_manifests(&mut self) -> Result<Vec<Repair>> {
        let mut repairs = Vec::new();
        let newest = self.manifests()?.iter().map(|m| m.step).max();
        for name in self.shards.names()? {
            if !is_manifest_copy(&name) {
                continue;
            }
            let path = self.shards.path(&name);
            let Some(manifest) = read_manifest_copy(&self.shards.read_named(&name)?) else {
                repairs.push(Repair(format!("the manifest copy {} is damaged and was not restored", path.display())));
                continue;
            };
            if newest.is_some_and(|newest| manifest.step <= newest) {
                continue;
            }
            let mut batch = WriteBatch::default();
            record::put(&mut batch, key::checkpoint(manifest.step), record::CHECKPOINT, &manifest)?;
            self.kv.apply(batch)?;
            repairs.push(Repair(format!("restored the checkpoint of step {} from {}", manifest.step, path.display())));
        }
        Ok(repairs)
    }
}

/// Checkpoints that were deleted from the database.
struct Retired {
    steps: Vec<u64>,
    /// Hashes of the shards that kept checkpoints have.
    used: BTreeSet<String>,
}

/// Ending of the names of manifest copies.
const COPY: &str = ".manifest";

/// Whether a file beside the shards is a copy of a manifest.
pub(crate) fn is_manifest_copy(name: &str) -> bool {
    name.ends_with(COPY)
}

/// Name of the copy of a manifest, beside the shards.
fn copy_name(step: u64) -> String {
    format!("{step:012}{COPY}")
}

/// The copy of a manifest: see [`read_manifest_copy`].
fn manifest_copy(manifest: &Manifest) -> Result<Vec<u8>> {
    let payload = postcard::to_stdvec(manifest).map_err(|e| Error::Encode(e.to_string()))?;
    let mut bytes = vec![record::CHECKPOINT.version];
    bytes.extend_from_slice(blake3::hash(&payload).as_bytes());
    bytes.extend_from_slice(&payload);
    Ok(bytes)
}

/// A manifest from a copy: a version byte, a blake3 hash (32 bytes) and the payload. `None` if it is damaged.
fn read_manifest_copy(bytes: &[u8]) -> Option<Manifest> {
    let (header, payload) = bytes.split_at_checked(33)?;
    let intact = header[0] == record::CHECKPOINT.version && header[1..] == *blake3::hash(payload).as_bytes();
    if intact { postcard::from_bytes(payload).ok() } else { None }
}

/// Groups consecutive tensors into shards of at least [`SHARD_BYTES_MIN`] bytes; the last may be smaller.
fn shard_groups<'a, 'b>(tensors: &'a [TensorBytes<'b>]) -> Vec<&'a [TensorBytes<'b>]> {
    let mut groups = Vec::new();
    let (mut start, mut filled) = (0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        filled += tensor.data.len();
        if filled >= SHARD_BYTES_MIN {
            groups.push(&tensors[start..=i]);
            (start, filled) = (i + 1, 0);
        }
    }
    if start < tensors.len() {
        groups.push(&tensors[start..]);
    }
    groups
}

fn serialize(tensors: &[TensorBytes<'_>]) -> Result<Vec<u8>> {
    let encode = |e: safetensors::SafeTensorError| Error::Encode(e.to_string());
    let views = tensors
        .iter()
        .map(|t| {
            let dtype = dtype(t.dtype)
                .ok_or_else(|| Error::Encode(format!("`{}` has the unknown type {}", t.name, t.dtype)))?;
            Ok((t.name.as_str(), TensorView::new(dtype, t.shape.clone(), t.data).map_err(encode)?))
        })
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize(views, None).map_err(encode)
}

/// Whether all elements of a tensor of floating-point numbers are finite. The exponent of a NaN and of an infinity is all
/// ones.
fn is_finite(tensor: &TensorBytes<'_>) -> bool {
    let halves = |mask: u16| {
        let (pairs, _) = tensor.data.as_chunks::<2>();
        pairs.iter().all(|b| u16::from_le_bytes(*b) & mask != mask)
    };
    match tensor.dtype {
        "F32" => tensor.data.as_chunks::<4>().0.iter().all(|b| f32::from_le_bytes(*b).is_finite()),
        "F64" => tensor.data.as_chunks::<8>().0.iter().all(|b| f64::from_le_bytes(*b).is_finite()),
        "F16" => halves(0x7c00),
        "BF16" => halves(0x7f80),
        _ => true,
    }
}

const DTYPES: [(&str, Dtype); 6] = [
    ("F32", Dtype::F32),
    ("F64", Dtype::F64),
    ("F16", Dtype::F16),
    ("BF16", Dtype::BF16),
    ("U8", Dtype::U8),
    ("U32", Dtype::U32),
];

fn dtype(name: &str) -> Option<Dtype> {
    DTYPES.iter().find(|(n, _)| *n == name).map(|(_, d)| *d)
}

fn dtype_name(dtype: Dtype) -> Option<&'static str> {
    DTYPES.iter().find(|(_, d)| *d == dtype).map(|(n, _)| *n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(fill: u8, megabytes: usize) -> Vec<(String, Vec<u8>)> {
        // The first two are large enough for shards of their own.
        (0..3).map(|i| (format!("t{i}"), vec![if i == 0 { 1 } else { fill }; (megabytes << 20).max(64)])).collect()
    }

    fn models(step: u64) -> BTreeMap<String, ModelCounters> {
        BTreeMap::from([("policy".into(), ModelCounters { version: step, optimizer_steps: step + 1 })])
    }

    fn save(store: &mut Store, step: u64, data: &[(String, Vec<u8>)]) -> SavedCheckpoint {
        let views: Vec<_> = data
            .iter()
            .map(|(name, data)| TensorBytes { name: name.clone(), dtype: "U8", shape: vec![data.len()], data })
            .collect();
        store.save_checkpoint(step, &models(step), &views, format!("state {step}").as_bytes(), 2).unwrap()
    }

    fn check(store: &Store, step: u64, data: &[(String, Vec<u8>)]) {
        let loaded = store.load_checkpoint(step).unwrap();
        assert_eq!((loaded.models, loaded.state), (models(step), format!("state {step}").into_bytes()));
        let got: Vec<_> = loaded.tensors.into_iter().map(|t| (t.name, t.data)).collect();
        assert_eq!(got, data);
    }

    #[test]
    fn small_and_large_checkpoints_are_read_and_old_ones_deleted() {
        for megabytes in [0, 70] {
            let directory = tempfile::tempdir().unwrap();
            let (mut store, _) = Store::open(directory.path()).unwrap();
            for step in 1..=4 {
                save(&mut store, step, &tensors(step as u8, megabytes));
            }
            let steps: Vec<u64> = store.checkpoints().unwrap().iter().map(|c| c.step).collect();
            assert_eq!(steps, [3, 4]);
            check(&store, 4, &tensors(4, megabytes));
            drop(store);
            let (store, repairs) = Store::open(directory.path()).unwrap();
            assert_eq!(repairs, []);
            check(&store, 3, &tensors(3, megabytes));
            assert!(store.verify().unwrap().0.is_empty());
        }
    }

    #[test]
    fn unchanged_shards_are_shared_and_unused_ones_deleted() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(directory.path()).unwrap();
        assert_eq!(save(&mut store, 1, &tensors(1, 70)).shared, 0);
        let second = save(&mut store, 2, &tensors(2, 70));
        assert!(second.shared > 70 << 20 && second.written > 140 << 20, "{second:?}");
        save(&mut store, 3, &tensors(3, 70));
        let files = store.shards.names().unwrap();
        assert_eq!(files.iter().filter(|n| n.ends_with("safetensors")).count(), 5, "{files:?}");
    }

    #[test]
    fn a_damaged_checkpoint_is_reported_and_the_one_before_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(directory.path()).unwrap();
        save(&mut store, 1, &tensors(1, 70));
        save(&mut store, 2, &tensors(2, 70));
        let only_in_two: Vec<_> = (store.manifests().unwrap()[1].shards.iter().map(|s| s.hash.clone()))
            .filter(|h| !store.manifests().unwrap()[0].shards.iter().any(|s| s.hash == *h))
            .collect();
        let path = directory.path().join("checkpoints").join(format!("{}.safetensors", only_in_two[0]));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[1000] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let (latest, damaged) = store.latest_checkpoint().unwrap();
        assert_eq!(latest.unwrap().step, 1);
        assert!(damaged[0].0.contains(&only_in_two[0]), "{damaged:?}");
        assert_eq!(store.verify().unwrap().0.len(), 1);
    }

    #[test]
    fn a_damaged_header_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(directory.path()).unwrap();
        let mut batch = WriteBatch::default();
        let manifest = Manifest { step: 5, shards: Vec::new(), tensors: 0, state: b"\x01\x06pol".to_vec() };
        record::put(&mut batch, key::checkpoint(5), record::CHECKPOINT, &manifest).unwrap();
        store.kv.apply(batch).unwrap();
        let error = store.load_checkpoint(5).unwrap_err().to_string();
        assert!(error.contains("step 5") && error.contains("header"), "{error}");
        assert!(store.latest_checkpoint().unwrap().0.is_none());
    }

    #[test]
    fn a_lost_database_is_restored_from_the_copies() {
        for megabytes in [0, 70] {
            let directory = tempfile::tempdir().unwrap();
            let (mut store, _) = Store::open(directory.path()).unwrap();
            save(&mut store, 7, &tensors(1, megabytes));
            drop(store);
            std::fs::remove_dir_all(directory.path().join("store")).unwrap();
            for name in ["store.base", "store.journal"] {
                std::fs::remove_file(directory.path().join(name)).unwrap();
            }
            assert!(Store::exists(directory.path()));
            let (store, repairs) = Store::open(directory.path()).unwrap();
            assert!(repairs.iter().any(|r| r.0.contains("restored the checkpoint of step 7")), "{repairs:?}");
            check(&store, 7, &tensors(1, megabytes));
        }
    }

    #[test]
    fn a_shard_that_was_damaged_is_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(directory.path()).unwrap();
        let data = tensors(1, 0);
        save(&mut store, 1, &data);
        let shard = store.shards.names().unwrap().into_iter().find(|n| n.ends_with("safetensors")).unwrap();
        let path = store.shards.path(&shard);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let saved = save(&mut store, 2, &data);
        assert_eq!(saved.shared, 0);
        check(&store, 2, &data);
        check(&store, 1, &data);
    }

    #[test]
    fn a_checkpoint_of_an_older_build_with_tensors_in_the_database_is_read_and_retired() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(directory.path()).unwrap();
        let data = tensors(3, 0);
        let views: Vec<_> = data
            .iter()
            .map(|(name, data)| TensorBytes { name: name.clone(), dtype: "U8", shape: vec![data.len()], data })
            .collect();
        let bytes = serialize(&views).unwrap();
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let mut batch = WriteBatch::default();
        for (i, part) in bytes.chunks(record::PART_BYTES).enumerate() {
            batch.put(key::shard_part(&hash, i as u32), part.to_vec());
        }
        let shards = vec![Shard { hash, bytes: bytes.len() as u64, inline: true }];
        let state = header::encode(&models(1), b"state 1").unwrap();
        let manifest = Manifest { step: 1, shards, tensors: 3, state };
        record::put(&mut batch, key::checkpoint(1), record::CHECKPOINT, &manifest).unwrap();
        store.kv.apply(batch).unwrap();
        check(&store, 1, &data);
        for step in 2..=3 {
            save(&mut store, step, &tensors(step as u8, 0));
        }
        assert_eq!(store.kv.scan(b"t/").unwrap().count(), 0, "its tensors are deleted with it");
    }

    #[test]
    fn weights_that_are_no_numbers_are_not_saved() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(directory.path()).unwrap();
        for (dtype, data) in [
            ("F32", [1f32, f32::NAN].map(f32::to_le_bytes).concat()),
            ("F64", [1f64, f64::INFINITY].map(f64::to_le_bytes).concat()),
            ("BF16", [0x3f80u16, 0xff80].map(u16::to_le_bytes).concat()),
            ("F16", [0x3c00u16, 0x7e00].map(u16::to_le_bytes).concat()),
        ] {
            let tensor = TensorBytes { name: "w".into(), dtype, shape: vec![2], data: &data };
            let error = store.save_checkpoint(4, &models(4), &[tensor], b"", 2).unwrap_err();
            assert!(matches!(&error, Error::NotFinite { step: 4, .. }), "{error}");
        }
        assert!(store.checkpoints().unwrap().is_empty());
    }
}
