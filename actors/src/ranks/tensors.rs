//! Tensors on a wire.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use super::Wire;
use super::message::wait_for;
use crate::files::{self, Described};
use crate::{Error, Result};

/// Descriptions of tensors, and their bytes.
pub fn described(tensors: &BTreeMap<String, Tensor>) -> Result<(Vec<Described>, Vec<Vec<u8>>)> {
    let mut all = (Vec::new(), Vec::new());
    for (name, tensor) in tensors {
        let (described, bytes) = files::described(name, tensor)?;
        all.0.push(described);
        all.1.push(bytes);
    }
    Ok(all)
}

/// Receives the tensors that follow a message.
pub fn receive(wire: &dyn Wire, from: usize, described: Vec<Described>) -> Result<BTreeMap<String, Tensor>> {
    let one = |described: Described| {
        let tensor = described.tensor(&wait_for(wire, from))?;
        Ok((described.name, tensor))
    };
    described.into_iter().map(one).collect()
}

/// The values of a f32 tensor on the CPU.
pub fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// A flat f32 tensor.
pub fn flat(values: Vec<f32>) -> Result<Tensor> {
    let n = values.len();
    Tensor::from_vec(values, n, &Device::Cpu).map_err(Error::from)
}
