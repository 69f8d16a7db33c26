//! A language model that is only read, outside of any role: a judge's.

use rehearsal_lm::{Batch, Checkpoint, Decoder, HeadKind, Precision, Sequence};

use crate::device::Seat;
use crate::{Devices, Error, Placement, Result};

/// A frozen language model on one of a job's devices, which it shares in turns.
pub struct FrozenModel {
    decoder: Decoder,
    seat: Seat,
}

impl FrozenModel {
    /// A checkpoint on a device.
    pub fn new(checkpoint: &Checkpoint, placement: Placement, precision: Precision, devices: &Devices) -> Result<Self> {
        if checkpoint.architecture.head != HeadKind::Language {
            return Err(Error::Start { role: "judge", reason: "its model is no language model".into() });
        }
        let seat = devices.seat(placement)?;
        let decoder = checkpoint.frozen(&seat.device, precision.dtype())?;
        Ok(Self { decoder, seat })
    }

    /// Log-probabilities of tokens that may come next.
    pub fn next(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>> {
        let batch =
            Batch::new(candidates.iter().map(|token| Sequence { prompt, completion: std::slice::from_ref(token) }));
        self.seat.run(|| Ok(self.decoder.logprobs(&batch, 1.0)?.to_dtype(candle_core::DType::F32)?.to_vec1()?))
    }
}
