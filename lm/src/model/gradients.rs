//! Sums of gradients.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use rehearsal_kernels::team::{chunk, for_each_chunk};

use super::decoder::Decoder;
use super::layers::{Norm, Projection};
use crate::error::{Error, Result};
use crate::ops::{with_floats, with_floats_mut};

/// Elements per task of a sum.
const CHUNK: usize = 64 * 1024;

/// The sums of gradients of the same names, f32 of the same shapes, on the devices of the first ones, whose memory they take
/// on the CPU. An element is the sum of two numbers, so threads and chunks change nothing.
///
/// # Errors
///
/// [`Error::NoGradient`] if a name is only in one of the two.
pub fn add_gradients(
    mut a: BTreeMap<String, Tensor>,
    b: &BTreeMap<String, Tensor>,
) -> Result<BTreeMap<String, Tensor>> {
    if let Some(name) = b.keys().find(|name| !a.contains_key(*name)) {
        return Err(Error::NoGradient(name.clone()));
    }
    for (name, sum) in &mut a {
        let more = b.get(name).ok_or_else(|| Error::NoGradient(name.clone()))?.to_device(sum.device())?;
        if sum.device().is_cpu() && sum.is_contiguous() && more.is_contiguous() && sum.dims() == more.dims() {
            with_floats_mut(sum, |sum| {
                with_floats(&more, |more| {
                    add_floats(sum, more);
                    Ok(())
                })
            })?;
        } else {
            *sum = (&*sum + more)?;
        }
    }
    Ok(a)
}

/// `x += y`, element by element.
pub fn add_floats(x: &mut [f32], y: &[f32]) {
    for_each_chunk(x, CHUNK, |i, x| x.iter_mut().zip(chunk(y, CHUNK, i)).for_each(|(x, y)| *x += y));
}

/// Gradients by parameter name, summed over micro-batches.
#[derive(Default)]
pub struct Gradients(BTreeMap<String, Tensor>);

impl Gradients {
    pub(crate) fn add(&mut self, name: &str, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(name) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.0.insert(name.to_string(), sum);
        Ok(())
    }

    /// The gradient of one parameter, an f32 tensor to be added to in place; zeros at first.
    pub(crate) fn sum(&mut self, name: &str, like: &Tensor) -> candle_core::Result<Tensor> {
        if let Some(sum) = self.0.get(name) {
            return Ok(sum.clone());
        }
        let sum = Tensor::zeros(like.shape(), DType::F32, like.device())?;
        self.0.insert(name.to_string(), sum.clone());
        Ok(sum)
    }

    /// The gradients of a norm's weight and bias, to be added to.
    pub(crate) fn sums_of_norm(&mut self, norm: &Norm) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        self.sums(&norm.name, &norm.weight, norm.bias.as_ref())
    }

    /// The gradients of a projection's weight, in the parameter's own shape, and bias, to be added to.
    pub(crate) fn sums_of_projection(&mut self, p: &Projection) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        let weight = if p.turned { p.weight.t()? } else { p.weight.clone() };
        self.sums(&p.name, &weight, p.bias.as_ref())
    }

    fn sums(
        &mut self,
        name: &str,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> candle_core::Result<(Tensor, Option<Tensor>)> {
        let bias = bias.map(|bias| self.sum(&format!("{name}.bias"), bias)).transpose()?;
        Ok((self.sum(&format!("{name}.weight"), weight)?, bias))
    }

    /// Whether no micro-batch has added any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The gradients, one for each variable of the model. Fails if a variable has none.
    pub fn complete(self, decoder: &Decoder) -> Result<BTreeMap<String, Tensor>> {
        match decoder.variables().keys().find(|name| !self.0.contains_key(*name)) {
            Some(name) => Err(Error::NoGradient(name.clone())),
            None => Ok(self.0),
        }
    }
}
