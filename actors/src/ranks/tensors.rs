//! Tensors on a wire.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::Wire;
use super::message::wait_for;
use crate::snapshot::{stored_dtype, tensor_of, with_bytes};
use crate::{Error, Result};

/// What tensors follow a message, each as a message of its bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Described {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

/// Descriptions of tensors, and their bytes.
pub fn described(tensors: &BTreeMap<String, Tensor>) -> Result<(Vec<Described>, Vec<Vec<u8>>)> {
    let mut all = (Vec::new(), Vec::new());
    for (name, tensor) in tensors {
        let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
        let (dtype, shape) = (stored_dtype(name, tensor.dtype())?.to_string(), tensor.dims().to_vec());
        all.0.push(Described { name: name.clone(), dtype, shape });
        all.1.push(with_bytes(name, &tensor, <[u8]>::to_vec)?);
    }
    Ok(all)
}

/// Receives the tensors that follow a message.
pub fn receive(wire: &dyn Wire, from: usize, described: Vec<Described>) -> Result<BTreeMap<String, Tensor>> {
    let one = |Described { name, dtype, shape }: Described| {
        let bytes = wait_for(wire, from);
        let tensor = tensor_of(&name, &dtype, &shape, &bytes)?;
        Ok((name, tensor))
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
