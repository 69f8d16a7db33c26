//! AdamW (Loshchilov & Hutter 2019), updated in place, with moments that can be saved.

mod gpu;
mod moments;
mod shards;
mod update;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Tensor, Var};
use rayon::prelude::*;
use rehearsal_kernels::gpu::{self as backends, GpuBackend};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};
pub use gpu::SOURCE as GPU_SOURCE;
pub use moments::MomentType;
use moments::{Moment, Moments};
pub use shards::{Ranges, joined, shards};
use update::Rule;

/// Elements of a gradient that are summed as one block of the gradient norm. This fixes the order of summation.
pub const BLOCK: usize = 64 * 1024;

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only: norms and biases are left alone.
    pub weight_decay: f64,
    /// Type in which the moments are stored.
    pub moments: MomentType,
    /// Where `eps` is added to the denominator.
    pub rule: AdamRule,
}

/// Where `eps` is added. The two variants differ in the first steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum AdamRule {
    /// `lr · m̂ / (√v̂ + eps)`, with both moments corrected (PyTorch).
    #[default]
    Corrected,
    /// `lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + eps)`: "epsilon hat" of Kingma & Ba 2015, §2 (TensorFlow 1, with which
    /// the first RLHF papers were made). Its first steps are smaller.
    EpsilonHat,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            moments: MomentType::Full,
            rule: AdamRule::Corrected,
        }
    }
}

/// `p ← p(1 - lr·wd) - lr · m̂ / (√v̂ + eps)` with bias-corrected moments.
pub struct AdamW {
    config: AdamWConfig,
    step: u64,
    moments: BTreeMap<String, Moments>,
    /// The elements of each variable that are updated; `None` for all.
    ranges: Option<Ranges>,
    /// The GPU that the variables are on.
    backend: Option<Arc<dyn GpuBackend>>,
}

impl AdamW {
    /// Zero moments for every variable.
    pub fn new(variables: &BTreeMap<String, Var>, config: AdamWConfig) -> Result<Self> {
        Self::of(variables, config, None)
    }

    /// An optimizer that holds the moments of some elements of the variables, and updates these alone: one of the
    /// [`shards`]. What it does to an element is what an optimizer of all elements does.
    pub fn of_shard(variables: &BTreeMap<String, Var>, config: AdamWConfig, ranges: Ranges) -> Result<Self> {
        Self::of(variables, config, Some(ranges))
    }

    fn of(variables: &BTreeMap<String, Var>, config: AdamWConfig, ranges: Option<Ranges>) -> Result<Self> {
        let mut moments = BTreeMap::new();
        for (name, var) in variables {
            let zeros = match &ranges {
                None => Moments::zeros(var, config.moments)?,
                Some(ranges) => match ranges.get(name) {
                    Some(range) => Moments::zeros(&part(var, range)?, config.moments)?,
                    None => continue,
                },
            };
            moments.insert(name.clone(), zeros);
        }
        let device = variables.values().next().map(|var| var.device());
        let backend = device.map_or(Ok(None), backends::for_device)?;
        Ok(Self { config, step: 0, moments, ranges, backend })
    }

    /// Runs the steps on a GPU backend, which must be able to access the variables.
    pub fn with_gpu_backend(mut self, backend: Arc<dyn GpuBackend>) -> Self {
        self.backend = Some(backend);
        self
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The optimizer state by name: moments `exp_avg.NAME` and `exp_avg_sq.NAME`, and the scales of eight-bit moments,
    /// `exp_avg_scale.NAME` and `exp_avg_sq_scale.NAME`. The tensors share storage with the optimizer. Those of a shard are
    /// parts, flat, which [`joined`] joins.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = BTreeMap::new();
        for (name, Moments { first, second }) in &self.moments {
            for (kind, moment) in [("exp_avg", first), ("exp_avg_sq", second)] {
                state.insert(format!("{kind}.{name}"), moment.values.clone());
                if let Some(scales) = &moment.scales {
                    state.insert(format!("{kind}_scale.{name}"), scales.clone());
                }
            }
        }
        state
    }

    /// Restores the optimizer state from [`AdamW::steps`] and [`AdamW::state`] of an optimizer of all elements; a shard takes
    /// its parts.
    pub fn restore(&mut self, steps: u64, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut restored = BTreeMap::new();
        for (name, moments) in &self.moments {
            let get = |key: String, like: &Tensor| -> Result<Tensor> {
                let found = state.get(&key).ok_or_else(|| Error::Moments(format!("`{key}` is missing")))?;
                let found = match self.ranges.as_ref().and_then(|ranges| ranges.get(name)) {
                    Some(range) => &shards::part_of_state(found, &key, range)?,
                    None => found,
                };
                if found.dims() != like.dims() {
                    return Err(Error::Moments(format!("`{key}` is {:?}, wanted {:?}", found.dims(), like.dims())));
                }
                // Eight-bit codes cannot be converted to another type.
                if found.dtype() != like.dtype() && [found.dtype(), like.dtype()].contains(&DType::U8) {
                    return Err(Error::Moments(format!(
                        "`{key}` is stored as {:?}, but the configuration asks for {:?}; \
                         resume with the setting `moments` that the job was started with",
                        found.dtype(),
                        like.dtype()
                    )));
                }
                // A copy, since the optimizer updates in place.
                Ok(found.to_device(like.device())?.to_dtype(like.dtype())?.copy()?)
            };
            let moment = |kind: &str, like: &Moment| -> Result<Moment> {
                let values = get(format!("{kind}.{name}"), &like.values)?;
                let scales = like.scales.as_ref().map(|like| get(format!("{kind}_scale.{name}"), like)).transpose()?;
                Ok(Moment { values, scales })
            };
            let both =
                Moments { first: moment("exp_avg", &moments.first)?, second: moment("exp_avg_sq", &moments.second)? };
            restored.insert(name.clone(), both);
        }
        self.step = steps;
        self.moments = restored;
        Ok(())
    }

    /// Updates the variables by one step at a learning rate. Gradients are multiplied by `scale` (from [`clip_scale`], or 1).
    ///
    /// # Errors
    /// If a variable has no gradient, or a gradient no variable; then nothing is changed.
    pub fn step(
        &mut self,
        variables: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Tensor>,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        if let Some(stray) = gradients.keys().find(|name| !variables.contains_key(*name)) {
            return Err(Error::StrayGradient(stray.clone()));
        }
        if let Some(name) = variables.keys().find(|name| !gradients.contains_key(*name)) {
            return Err(Error::NoGradient(name.clone()));
        }
        self.advance(variables, rate, scale, |name, range| match range {
            Some(range) => part(&gradients[name].contiguous()?, range),
            None => Ok(gradients[name].contiguous()?),
        })
    }

    /// [`AdamW::step`] of a shard by the gradients of its own elements, flat.
    ///
    /// # Errors
    /// If one of its variables has no gradient; then nothing is changed.
    pub fn step_shard(
        &mut self,
        variables: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Tensor>,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        if let Some(name) =
            self.ranges.iter().flatten().map(|(name, _)| name).find(|name| !gradients.contains_key(*name))
        {
            return Err(Error::NoGradient(name.clone()));
        }
        self.advance(variables, rate, scale, |name, _| Ok(gradients[name].clone()))
    }

    /// Takes a step. `gradient` gives the gradients of the elements of a variable that are updated.
    fn advance(
        &mut self,
        variables: &BTreeMap<String, Var>,
        rate: f64,
        scale: f64,
        gradient: impl Fn(&String, Option<&Range<usize>>) -> Result<Tensor>,
    ) -> Result<()> {
        self.step += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let correction = |beta: f64| 1.0 - beta.powi(self.step.min(i32::MAX as u64) as i32);
        for (name, var) in variables {
            let Some(moments) = self.moments.get(name) else {
                // Another shard has all of it.
                match &self.ranges {
                    Some(_) => continue,
                    None => return Err(Error::StrayGradient(name.clone())),
                }
            };
            let range = self.ranges.as_ref().and_then(|ranges| ranges.get(name));
            let (mut parameter, gradient) = (var.as_detached_tensor(), gradient(name, range)?);
            let mut from = 0;
            if let Some(range) = range {
                (parameter, from) = (part(&parameter, range)?, range.start as u32);
            }
            let decay = if var.dims().len() > 1 { 1.0 - rate * weight_decay } else { 1.0 };
            let (rate, root) = (rate / correction(beta1), correction(beta2).sqrt());
            let (rate, root) = match self.config.rule {
                AdamRule::Corrected => (rate, root),
                AdamRule::EpsilonHat => (rate * root, 1.0),
            };
            let salt = (self.step as u32).wrapping_mul(0x9e37_79b9);
            let rule = Rule { beta1, beta2, decay, rate, root, eps, scale, salts: [salt, salt ^ 0x5bd1_e995], from };
            match &self.backend {
                Some(backend) => gpu::update(&**backend, &parameter, moments, &gradient, rule)?,
                None => update::update(&parameter, moments, &gradient, rule)?,
            }
        }
        Ok(())
    }
}

/// Some elements of a contiguous tensor, flat; they share its storage.
fn part(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.flatten_all()?.narrow(0, range.start, range.len())?)
}

/// Euclidean norm of all gradients together, summed in f64 in a fixed order. Synchronises with a GPU once.
pub fn global_norm(gradients: &BTreeMap<String, Tensor>) -> Result<f64> {
    let device = gradients.values().next().map(Tensor::device);
    match device.map_or(Ok(None), backends::for_device)? {
        Some(backend) => global_norm_on(&*backend, gradients),
        None => Ok(gradients.values().map(sum_of_squares).sum::<Result<f64>>()?.sqrt()),
    }
}

/// [`global_norm`] by a GPU backend, which must be able to access the gradients.
pub fn global_norm_on(backend: &dyn GpuBackend, gradients: &BTreeMap<String, Tensor>) -> Result<f64> {
    let tensor = |gradient: &Tensor| gradient.to_dtype(DType::F32)?.contiguous();
    let tensors = gradients.values().map(tensor).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(gpu::squares(backend, &tensors)?.iter().sum::<f64>().sqrt())
}

/// Sums of squares of the blocks of [`BLOCK`] elements; the last may be shorter.
pub fn block_squares(data: &[f32]) -> Vec<f64> {
    let square = |block: &[f32]| block.iter().map(|&x| x as f64 * x as f64).sum();
    data.par_chunks(BLOCK).map(square).collect()
}

/// Sum of the squares of a tensor on the CPU.
fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (candle_core::Storage::Cpu(CpuStorage::F32(data)), Some((from, to))) => {
            Ok(block_squares(&data[from..to]).iter().sum())
        }
        _ => Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?),
    }
}

/// Factor that clips gradients of global norm `norm` to `max_norm`: `min(1, max_norm / (norm + 1e-6))`; 1 without a
/// `max_norm`.
pub fn clip_scale(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn variables() -> BTreeMap<String, Var> {
        let var = |x: &[f32]| Var::new(x, &Device::Cpu).unwrap();
        BTreeMap::from([("a".into(), var(&[1.0, 2.0])), ("b".into(), var(&[3.0]))])
    }

    #[test]
    fn a_missing_or_stray_gradient_is_an_error_and_changes_nothing() {
        let variables = variables();
        let mut optimizer = AdamW::new(&variables, AdamWConfig::default()).unwrap();
        let mut gradients: BTreeMap<_, _> = [("a".to_string(), variables["a"].as_tensor().clone())].into();
        let error = optimizer.step(&variables, &gradients, 0.1, 1.0).unwrap_err().to_string();
        assert!(error.contains("`b`"), "{error}");
        gradients.insert("b".into(), variables["b"].as_tensor().clone());
        gradients.insert("c".into(), variables["b"].as_tensor().clone());
        assert!(optimizer.step(&variables, &gradients, 0.1, 1.0).is_err());
        assert_eq!(variables["a"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(optimizer.steps(), 0);
    }

    #[test]
    fn restored_moments_go_on_to_the_same_bits() {
        let (one, two) = (variables(), variables());
        let gradients: BTreeMap<_, _> =
            one.iter().map(|(n, v)| (n.clone(), v.as_detached_tensor().copy().unwrap())).collect();
        let mut straight = AdamW::new(&one, AdamWConfig::default()).unwrap();
        let mut broken = AdamW::new(&two, AdamWConfig::default()).unwrap();
        for _ in 0..3 {
            straight.step(&one, &gradients, 0.1, 1.0).unwrap();
            broken.step(&two, &gradients, 0.1, 1.0).unwrap();
            let mut next = AdamW::new(&two, AdamWConfig::default()).unwrap();
            next.restore(broken.steps(), &broken.state()).unwrap();
            broken = next;
        }
        for (name, var) in &one {
            assert_eq!(var.to_vec1::<f32>().unwrap(), two[name].to_vec1::<f32>().unwrap());
        }
    }

    #[test]
    fn bfloat16_moments_follow_the_full_ones_on_average_and_repeat_to_the_bit() {
        let n = 4096;
        let run = |moments| {
            let var = Var::zeros(n, DType::F32, &Device::Cpu).unwrap();
            let variables = BTreeMap::from([("w".to_string(), var)]);
            let config = AdamWConfig { moments, ..Default::default() };
            let mut optimizer = AdamW::new(&variables, config).unwrap();
            for step in 0..400 {
                let size = if step < 200 { 1.0 } else { 0.1 };
                let gradients =
                    BTreeMap::from([("w".to_string(), Tensor::full(size as f32, n, &Device::Cpu).unwrap())]);
                optimizer.step(&variables, &gradients, 1e-3, 1.0).unwrap();
            }
            let mean = |t: &Tensor| t.to_dtype(DType::F64).unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap();
            let state = optimizer.state();
            (mean(&state["exp_avg_sq.w"]), variables["w"].to_vec1::<f32>().unwrap())
        };
        let ((full, _), (half, weights)) = (run(MomentType::Full), run(MomentType::Bf16));
        // Rounded to the nearest, the second moment would never come down: a step takes off a thousandth.
        assert!((half / full - 1.0).abs() < 0.01, "{half} against {full}");
        assert_eq!(weights, run(MomentType::Bf16).1);
    }

    /// Noisy steps on a quadratic bowl, with moments of a type.
    fn descend(kind: MomentType, restart: bool) -> Vec<f32> {
        let n = 1000;
        let start: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let variables = BTreeMap::from([("w".to_string(), Var::new(start.as_slice(), &Device::Cpu).unwrap())]);
        let config = AdamWConfig { moments: kind, ..Default::default() };
        let mut optimizer = AdamW::new(&variables, config).unwrap();
        for step in 0..300u32 {
            let noise: Vec<f32> =
                (0..n).map(|i| moments::scramble(step * 1000 + i as u32) as f32 / u32::MAX as f32 - 0.5).collect();
            let noise = Tensor::new(noise.as_slice(), &Device::Cpu).unwrap();
            let gradient = (variables["w"].as_detached_tensor() + (noise * 0.1).unwrap()).unwrap();
            optimizer.step(&variables, &[("w".to_string(), gradient)].into(), 1e-2, 1.0).unwrap();
            if restart && step % 100 == 50 {
                let mut next = AdamW::new(&variables, config).unwrap();
                next.restore(optimizer.steps(), &optimizer.state()).unwrap();
                optimizer = next;
            }
        }
        variables["w"].to_vec1().unwrap()
    }

    #[test]
    fn moments_in_eight_bits_lead_to_the_same_place_and_resume_to_the_bit() {
        let distance = |x: &[f32]| (x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
        let (full, eight) = (descend(MomentType::Full, false), descend(MomentType::Int8, false));
        assert!(distance(&eight) < distance(&full) + 0.02, "{} against {}", distance(&eight), distance(&full));
        assert!(distance(&eight) < 0.1);
        assert_eq!(eight, descend(MomentType::Int8, true));
    }

    #[test]
    fn shards_together_do_what_the_whole_does() {
        let n = 3 * BLOCK + 700;
        let start: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let make = || {
            let var = |from: usize, len: usize| Var::new(&start[from..from + len], &Device::Cpu).unwrap();
            BTreeMap::from([("a".to_string(), var(0, n)), ("b".into(), var(5, 9)), ("c".into(), var(1, BLOCK + 1))])
        };
        for moments in [MomentType::Full, MomentType::Bf16, MomentType::Int8] {
            let config = AdamWConfig { moments, ..Default::default() };
            for members in [1, 2, 3, 7] {
                let (whole, parts) = (make(), make());
                let mut optimizer = AdamW::new(&whole, config).unwrap();
                let mut all: Vec<AdamW> = shards(&parts, members)
                    .into_iter()
                    .map(|ranges| AdamW::of_shard(&parts, config, ranges).unwrap())
                    .collect();
                for step in 0..4 {
                    let gradient = |(name, var): (&String, &Var)| {
                        (name.clone(), (var.as_detached_tensor() * (0.5 + f64::from(step))).unwrap())
                    };
                    let (of_whole, of_parts) =
                        (whole.iter().map(gradient).collect(), parts.iter().map(gradient).collect());
                    optimizer.step(&whole, &of_whole, 1e-2, 0.9).unwrap();
                    for shard in &mut all {
                        shard.step(&parts, &of_parts, 1e-2, 0.9).unwrap();
                    }
                    if step == 1 {
                        // Saved by all and restored by each.
                        let state =
                            joined(all.iter().map(|shard| (shard.ranges.clone().unwrap(), shard.state())), &parts);
                        let state = state.unwrap();
                        for (name, tensor) in optimizer.state() {
                            let floats = |t: &Tensor| {
                                t.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap()
                            };
                            assert_eq!(floats(&tensor), floats(&state[&name]), "{name}");
                            assert_eq!(tensor.dims(), state[&name].dims(), "{name}");
                        }
                        for shard in &mut all {
                            shard.restore(2, &state).unwrap();
                        }
                    }
                }
                for (name, var) in &whole {
                    let (want, got) = (var.to_vec1::<f32>().unwrap(), parts[name].to_vec1::<f32>().unwrap());
                    assert!(want == got, "{name} of {members} members, {moments:?}");
                }
            }
        }
    }

    #[test]
    fn moments_of_another_type_are_refused() {
        let variables = variables();
        let with = |moments| AdamW::new(&variables, AdamWConfig { moments, ..Default::default() }).unwrap();
        let state = with(MomentType::Full).state();
        let error = with(MomentType::Int8).restore(3, &state).unwrap_err().to_string();
        assert!(error.contains("exp_avg.a") && error.contains("moments"), "{error}");
    }
}
