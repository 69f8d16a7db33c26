//! A frozen language model that belongs to no role, for a judge.

use rehearsal_lm::{Batch, Checkpoint, Decoder, HeadKind, Precision, Sequence};

use crate::device::SharedDevice;
use crate::{Devices, Error, Placement, Result};

/// A frozen language model on one of the job's devices, which it shares with the roles on it.
pub struct FrozenModel {
    decoder: Decoder,
    compute: SharedDevice,
}

impl FrozenModel {
    /// Loads a checkpoint onto a device.
    ///
    /// # Errors
    ///
    /// [`Error::Start`] if the checkpoint has no language-model head, [`Error::Placement`] if the device cannot be opened.
    pub fn new(checkpoint: &Checkpoint, placement: Placement, precision: Precision, devices: &Devices) -> Result<Self> {
        if checkpoint.architecture.head != HeadKind::Language {
            return Err(Error::Start { role: "judge", reason: "its model has no language-model head".into() });
        }
        let compute = devices.get(placement)?;
        let decoder = checkpoint.frozen(&compute.device, precision.dtype())?;
        Ok(Self { decoder, compute })
    }

    /// Log-probabilities, at temperature 1, of each of `candidates` as the token after `prompt`, in their order.
    pub fn next_token_logprobs(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>> {
        let batch =
            Batch::new(candidates.iter().map(|token| Sequence { prompt, completion: std::slice::from_ref(token) }));
        self.compute.run(|| Ok(self.decoder.logprobs(&batch, 1.0)?.to_dtype(candle_core::DType::F32)?.to_vec1()?))
    }
}
