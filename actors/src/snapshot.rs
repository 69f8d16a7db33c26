//! Trained models as checkpoints hold them: the names of their tensors, and the way into the store and back.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var};
use rehearsal_lm::{Checkpoint, Parameters};
use rehearsal_store::{LoadedCheckpoint, ModelCounters, OwnedTensor, Repair, Store};

use crate::{Error, LoraInit, Result};

/// Kind of the tensors that are trained: the model's weights, or its adapters.
const WEIGHTS: &str = "weights";
/// Kind of the exponential moving averages of the trained tensors.
const AVERAGE: &str = "average";

/// Names that the store uses for the types of tensors.
const DTYPES: [(DType, &str); 4] = [(DType::F32, "F32"), (DType::F64, "F64"), (DType::BF16, "BF16"), (DType::U8, "U8")];

/// The weights and the optimizer state of a trained model.
///
/// The tensors share storage with the model: save them before its next step.
#[derive(Clone, Default)]
pub struct ModelSnapshot {
    /// Number of updates of the weights.
    pub version: u64,
    /// Steps of the optimizer; 0 in a snapshot of weights alone.
    pub optimizer_steps: u64,
    /// `weights.NAME`, the optimizer's `exp_avg.NAME` and `exp_avg_sq.NAME`, and `average.NAME` where weights are
    /// averaged. `NAME` is the parameter's name in Hugging Face's files, or the adapter's in PEFT's.
    pub tensors: BTreeMap<String, Tensor>,
}

impl ModelSnapshot {
    /// A snapshot of trained tensors, their averages if there are any, and the state of their optimizer.
    pub(crate) fn new(
        version: u64,
        optimizer_steps: u64,
        trained: &BTreeMap<String, Var>,
        average: Option<&Parameters>,
        optimizer: BTreeMap<String, Tensor>,
    ) -> Self {
        let mut tensors = optimizer;
        tensors.extend(trained.iter().map(|(name, var)| (format!("{WEIGHTS}.{name}"), var.as_detached_tensor())));
        let average = average.into_iter().flatten();
        tensors.extend(average.map(|(name, tensor)| (format!("{AVERAGE}.{name}"), tensor.clone())));
        Self { version, optimizer_steps, tensors }
    }

    /// A snapshot of trained tensors alone.
    pub(crate) fn of_weights(version: u64, trained: Parameters) -> Self {
        let tensors = trained.into_iter().map(|(name, tensor)| (format!("{WEIGHTS}.{name}"), tensor)).collect();
        Self { version, optimizer_steps: 0, tensors }
    }

    /// A snapshot that shares no storage with the model.
    #[cfg(test)]
    pub(crate) fn copied(&self) -> Self {
        let copy = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.copy().expect("a copy"));
        Self { tensors: self.tensors.iter().map(copy).collect(), ..*self }
    }

    /// Sets variables to the snapshot's trained tensors, on the variables' devices and in their types.
    pub(crate) fn set_weights(&self, variables: &BTreeMap<String, Var>) -> Result<()> {
        for (name, var) in variables {
            let tensor = self.tensor(WEIGHTS, name)?;
            var.set(&tensor.to_device(var.device())?.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    /// The average of a trained tensor.
    pub(crate) fn average(&self, name: &str) -> Result<&Tensor> {
        self.tensor(AVERAGE, name)
    }

    fn tensor(&self, kind: &str, name: &str) -> Result<&Tensor> {
        let name = format!("{kind}.{name}");
        self.tensors.get(&name).ok_or_else(|| Error::Checkpoint(format!("a model's snapshot has no tensor `{name}`")))
    }

    /// Puts the snapshot's weights, or their averages where there are any, into the model that the training started
    /// from. `lora` is what its adapters started from, if adapters were trained; they are merged into the weights.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if the snapshot lacks one of the model's parameters or adapters.
    pub fn apply_to(&self, checkpoint: &mut Checkpoint, lora: Option<&LoraInit>) -> Result<()> {
        let averaged = self.tensors.keys().any(|name| name.split_once('.').is_some_and(|(kind, _)| kind == AVERAGE));
        let kind = if averaged { AVERAGE } else { WEIGHTS };
        match lora {
            Some(start) => {
                let lora = start.load(checkpoint, &Device::Cpu)?;
                for (name, var) in lora.variables() {
                    var.set(self.tensor(kind, name)?)?;
                }
                let merged = lora.merged(checkpoint, &Device::Cpu)?;
                checkpoint.parameters.extend(merged);
            }
            None => {
                let of = |name: String| {
                    let tensor = self.tensor(kind, &name)?.clone();
                    Ok((name, tensor))
                };
                let names: Vec<String> = checkpoint.parameters.keys().cloned().collect();
                checkpoint.parameters = names.into_iter().map(of).collect::<Result<_>>()?;
            }
        }
        Ok(())
    }

    pub(crate) fn counters(&self) -> ModelCounters {
        ModelCounters { version: self.version, optimizer_steps: self.optimizer_steps }
    }
}

/// A checkpoint read back from the store.
pub struct Restored {
    /// Number of steps done.
    pub step: u64,
    /// The trained models by role.
    pub models: BTreeMap<String, ModelSnapshot>,
    /// The job's own state, as it was saved.
    pub state: Vec<u8>,
}

impl Restored {
    /// Reads the newest undamaged checkpoint of a store, and a note for each newer one that is damaged.
    ///
    /// # Errors
    ///
    /// [`Error::Store`] if the store cannot be read, [`Error::Checkpoint`] if a tensor belongs to none of the
    /// checkpoint's models or has a type that models do not have.
    pub fn latest(store: &Store) -> Result<(Option<Self>, Vec<Repair>)> {
        let (latest, repairs) = store.latest_checkpoint()?;
        Ok((latest.map(Self::from_store).transpose()?, repairs))
    }

    fn from_store(loaded: LoadedCheckpoint) -> Result<Self> {
        let empty = |counters: ModelCounters| ModelSnapshot {
            version: counters.version,
            optimizer_steps: counters.optimizer_steps,
            tensors: BTreeMap::new(),
        };
        let mut models: BTreeMap<_, _> = loaded.models.into_iter().map(|(role, c)| (role, empty(c))).collect();
        for t in loaded.tensors {
            let model = t.name.split_once('.').and_then(|(role, name)| Some((models.get_mut(role)?, name.to_string())));
            let Some((model, name)) = model else {
                return Err(Error::Checkpoint(format!(
                    "tensor `{}` of the checkpoint of step {} belongs to none of its models",
                    t.name, loaded.step
                )));
            };
            model.tensors.insert(name, from_store(&t)?);
        }
        Ok(Self { step: loaded.step, models, state: loaded.state })
    }
}

/// The name of a model's tensor in a checkpoint: `ROLE.KIND.NAME`.
pub(crate) fn stored_name(role: &str, tensor: &str) -> String {
    format!("{role}.{tensor}")
}

/// The store's name of a tensor's type.
pub(crate) fn stored_dtype(name: &str, dtype: DType) -> Result<&'static str> {
    let found = DTYPES.iter().find(|(d, _)| *d == dtype).map(|(_, stored)| *stored);
    found.ok_or_else(|| unstored_type(name, dtype))
}

/// The error for a tensor of a type that checkpoints do not hold.
pub(crate) fn unstored_type(name: &str, dtype: DType) -> Error {
    Error::Checkpoint(format!("tensor `{name}` has the type {dtype:?}, which checkpoints do not hold"))
}

fn from_store(t: &OwnedTensor) -> Result<Tensor> {
    tensor_of(&t.name, &t.dtype, &t.shape, &t.data)
}

/// The tensor of a stored type, a shape and bytes.
pub(crate) fn tensor_of(name: &str, dtype: &str, shape: &[usize], data: &[u8]) -> Result<Tensor> {
    let Some((dtype, _)) = DTYPES.iter().find(|(_, stored)| *stored == dtype) else {
        return Err(Error::Checkpoint(format!("tensor `{name}` has the unknown type {dtype}")));
    };
    Ok(Tensor::from_raw_buffer(data, *dtype, shape, &Device::Cpu)?)
}

/// Calls `f` with the bytes of a contiguous tensor on the CPU.
pub(crate) fn with_bytes<T>(name: &str, tensor: &Tensor, f: impl FnOnce(&[u8]) -> T) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((from, to)) = layout.contiguous_offsets() else {
        return Err(Error::Checkpoint(format!("tensor `{name}` is not contiguous")));
    };
    Ok(f(bytes(name, &storage, from..to)?))
}

/// The bytes of some elements of a storage on the CPU.
pub(crate) fn bytes<'a>(name: &str, storage: &'a Storage, range: std::ops::Range<usize>) -> Result<&'a [u8]> {
    Ok(match storage {
        Storage::Cpu(CpuStorage::F32(x)) => bytemuck::cast_slice(&x[range]),
        Storage::Cpu(CpuStorage::F64(x)) => bytemuck::cast_slice(&x[range]),
        Storage::Cpu(CpuStorage::BF16(x)) => bytemuck::cast_slice(&x[range]),
        Storage::Cpu(CpuStorage::U8(x)) => &x[range],
        other => return Err(unstored_type(name, other.dtype())),
    })
}
