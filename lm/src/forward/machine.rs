//! The machine that a decoder's passes run on.

use crate::cpu::Cpu;
use crate::gpu::Gpu;
use crate::model::Decoder;
use crate::ops::Kernels;

/// The backend that runs the passes of a decoder.
pub enum Machine {
    Cpu(Cpu),
    Gpu(Gpu),
}

/// The backend of a decoder; `None` if it runs as candle graphs.
pub fn machine(decoder: &Decoder) -> Option<Machine> {
    use candle_core::DType::{BF16, F32};
    if decoder.kernels() != Kernels::Fused || !matches!(decoder.dtype(), F32 | BF16) {
        return None;
    }
    let precision = decoder.precision();
    match decoder.gpu() {
        Some(context) => Some(Machine::Gpu(Gpu::new(context, precision, decoder.architecture().head_dim))),
        None => decoder.device().is_cpu().then_some(Machine::Cpu(Cpu(precision))),
    }
}
