//! AdamW (Loshchilov & Hutter 2019), updated in place, with moments that can be saved.

use std::collections::BTreeMap;

use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Result as CandleResult, Tensor, Var, bail};
use half::bf16;
use rayon::prelude::*;

use crate::{Error, Result};

/// Elements a task takes at a time; also the grain of the gradient norm, whose order of summation it fixes.
const BLOCK: usize = 64 * 1024;

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on matrices only: norms and biases are left alone.
    pub weight_decay: f64,
    /// What the moments are stored as.
    pub moments: MomentType,
    /// Where `eps` is added.
    pub rule: AdamRule,
}

/// Where Adam adds its `eps`; the two differ in the first steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdamRule {
    /// `lr · m̂ / (√v̂ + eps)`, with both moments corrected (PyTorch).
    #[default]
    Corrected,
    /// `lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + eps)`: "epsilon hat" of Kingma & Ba 2015, §2 (TensorFlow 1, with which
    /// the first RLHF papers were made). Its first steps are smaller.
    EpsilonHat,
}

/// What moments are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MomentType {
    /// As the parameter is.
    #[default]
    Full,
    /// bfloat16, rounded up or down at random in proportion to what is cut off, so that small changes add up to what
    /// they should. The random bits are a function of the step and the element alone.
    Bf16,
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
}

struct Moments {
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// Zero moments for every variable.
    pub fn new(variables: &BTreeMap<String, Var>, config: AdamWConfig) -> Result<Self> {
        let moments = variables
            .iter()
            .map(|(name, var)| {
                let dtype = match config.moments {
                    MomentType::Full => var.dtype(),
                    MomentType::Bf16 => DType::BF16,
                };
                let zeros = || Tensor::zeros(var.shape(), dtype, var.device());
                Ok((name.clone(), Moments { first: zeros()?, second: zeros()? }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, step: 0, moments })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Moments by name, `exp_avg.NAME` and `exp_avg_sq.NAME`; they share storage with the optimiser.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        let pair = |(name, m): (&String, &Moments)| {
            [(format!("exp_avg.{name}"), m.first.clone()), (format!("exp_avg_sq.{name}"), m.second.clone())]
        };
        self.moments.iter().flat_map(pair).collect()
    }

    /// Takes over what [`AdamW::state`] and [`AdamW::steps`] gave.
    pub fn restore(&mut self, steps: u64, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut restored = BTreeMap::new();
        for (name, moments) in &self.moments {
            let get = |kind: &str, like: &Tensor| -> Result<Tensor> {
                let key = format!("{kind}.{name}");
                let found = state.get(&key).ok_or_else(|| Error::Moments(format!("`{key}` is missing")))?;
                if found.dims() != like.dims() {
                    return Err(Error::Moments(format!("`{key}` is {:?}, wanted {:?}", found.dims(), like.dims())));
                }
                // A copy: the optimiser writes in place.
                Ok(found.to_device(like.device())?.to_dtype(like.dtype())?.copy()?)
            };
            let both = Moments { first: get("exp_avg", &moments.first)?, second: get("exp_avg_sq", &moments.second)? };
            restored.insert(name.clone(), both);
        }
        self.step = steps;
        self.moments = restored;
        Ok(())
    }

    /// One step at a learning rate, with every gradient times `scale` ([`clip_scale`], or 1). Every variable must have
    /// a gradient, and every gradient a variable.
    pub fn step(
        &mut self,
        variables: &BTreeMap<String, Var>,
        gradients: &BTreeMap<String, Tensor>,
        rate: f64,
        scale: f64,
    ) -> Result<()> {
        if let Some(stray) = gradients.keys().find(|name| !self.moments.contains_key(*name)) {
            return Err(Error::StrayGradient(stray.clone()));
        }
        if let Some(name) = variables.keys().find(|name| !gradients.contains_key(*name)) {
            return Err(Error::NoGradient(name.clone()));
        }
        self.step += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = self.config;
        let correction = |beta: f64| 1.0 - beta.powi(self.step.min(i32::MAX as u64) as i32);
        for (name, var) in variables {
            let Some(moments) = self.moments.get_mut(name) else { return Err(Error::StrayGradient(name.clone())) };
            let gradient = gradients[name].contiguous()?;
            let decay = if var.dims().len() > 1 { 1.0 - rate * weight_decay } else { 1.0 };
            let (rate, root) = (rate / correction(beta1), correction(beta2).sqrt());
            let update = match self.config.rule {
                AdamRule::Corrected => Update { decay, rate, root, eps },
                AdamRule::EpsilonHat => Update { decay, rate: rate * root, root: 1.0, eps },
            };
            if var.device().is_cpu() {
                let blend = |beta, square| Blend { beta, square, scale, step: self.step };
                moments.first.inplace_op2(&gradient, &blend(beta1, false))?;
                moments.second.inplace_op2(&gradient, &blend(beta2, true))?;
                var.as_detached_tensor().inplace_op3(&moments.first, &moments.second, &update)?;
            } else {
                // On a GPU in candle's operations, where bfloat16 moments are rounded to the nearest.
                let (gradient, stored) = ((gradient * scale)?, moments.first.dtype());
                let wide = |m: &Tensor| m.to_dtype(gradient.dtype());
                let first = ((wide(&moments.first)? * beta1)? + (&gradient * (1.0 - beta1))?)?;
                let second = ((wide(&moments.second)? * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
                let denominator = ((second.sqrt()? / update.root)? + eps)?;
                let change = (first.div(&denominator)? * update.rate)?;
                (moments.first, moments.second) = (first.to_dtype(stored)?, second.to_dtype(stored)?);
                var.set(&((var.as_detached_tensor() * decay)? - change)?)?;
            }
        }
        Ok(())
    }
}

/// `m ← β m + (1-β) g` or, squared, `m ← β m + (1-β) g²`.
struct Blend {
    beta: f64,
    square: bool,
    scale: f64,
    step: u64,
}

/// One of the two bfloat16 numbers around `x`, each with the probability that makes the mean `x`; `seed` decides.
#[inline(always)]
fn round_at_random(x: f32, seed: u32) -> bf16 {
    // The finaliser of MurmurHash3.
    let mut h = seed;
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    let bits = x.to_bits();
    let up = bits.wrapping_add((h ^ (h >> 16)) & 0xffff);
    bf16::from_bits((if x.is_finite() { up } else { bits } >> 16) as u16)
}

/// The parameter's own change, given its moments.
struct Update {
    decay: f64,
    rate: f64,
    root: f64,
    eps: f64,
}

fn range(l: &Layout) -> CandleResult<std::ops::Range<usize>> {
    match l.contiguous_offsets() {
        Some((from, to)) => Ok(from..to),
        None => bail!("an optimiser's tensor must be contiguous"),
    }
}

impl InplaceOp2 for Blend {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, ml: &Layout, g: &CpuStorage, gl: &Layout) -> CandleResult<()> {
        let (mr, gr, square) = (range(ml)?, range(gl)?, self.square);
        macro_rules! blend {
            ($m:expr, $g:expr, $t:ty) => {{
                let (keep, take, scale) = (self.beta as $t, (1.0 - self.beta) as $t, self.scale as $t);
                $m[mr].par_chunks_mut(BLOCK).zip($g[gr].par_chunks(BLOCK)).for_each(|(m, g)| {
                    for (m, &g) in m.iter_mut().zip(g) {
                        let g = g * scale;
                        *m = keep * *m + take * if square { g * g } else { g };
                    }
                })
            }};
        }
        match (m, g) {
            (CpuStorage::F32(m), CpuStorage::F32(g)) => blend!(m, g, f32),
            (CpuStorage::F64(m), CpuStorage::F64(g)) => blend!(m, g, f64),
            (CpuStorage::BF16(m), CpuStorage::F32(g)) => {
                let (keep, take, scale) = (self.beta as f32, (1.0 - self.beta) as f32, self.scale as f32);
                let salt = (self.step as u32).wrapping_mul(0x9e37_79b9) ^ if square { 0x5bd1_e995 } else { 0 };
                let chunks = m[mr].par_chunks_mut(BLOCK).zip(g[gr].par_chunks(BLOCK)).enumerate();
                chunks.for_each(|(block, (m, g))| {
                    for (i, (m, &g)) in m.iter_mut().zip(g).enumerate() {
                        let g = g * scale;
                        let next = keep * m.to_f32() + take * if square { g * g } else { g };
                        *m = round_at_random(next, ((block * BLOCK + i) as u32) ^ salt);
                    }
                })
            }
            _ => bail!("moments and gradients must both be f32 or f64, or bf16 and f32"),
        }
        Ok(())
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        pl: &Layout,
        m: &CpuStorage,
        ml: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> CandleResult<()> {
        let (pr, mr, vr) = (range(pl)?, range(ml)?, range(vl)?);
        macro_rules! update {
            ($p:expr, $m:expr, $v:expr, $t:ty, $wide:expr) => {{
                let (decay, rate, root, eps) = (self.decay as $t, self.rate as $t, self.root as $t, self.eps as $t);
                let sources = $m[mr].par_chunks(BLOCK).zip($v[vr].par_chunks(BLOCK));
                $p[pr].par_chunks_mut(BLOCK).zip(sources).for_each(|(p, (m, v))| {
                    for ((p, &m), &v) in p.iter_mut().zip(m).zip(v) {
                        *p = *p * decay - rate * $wide(m) / ($wide(v).sqrt() / root + eps);
                    }
                })
            }};
        }
        match (p, m, v) {
            (CpuStorage::F32(p), CpuStorage::F32(m), CpuStorage::F32(v)) => update!(p, m, v, f32, |x: f32| x),
            (CpuStorage::F64(p), CpuStorage::F64(m), CpuStorage::F64(v)) => update!(p, m, v, f64, |x: f64| x),
            (CpuStorage::F32(p), CpuStorage::BF16(m), CpuStorage::BF16(v)) => update!(p, m, v, f32, bf16::to_f32),
            _ => bail!("parameters and moments must all be f32 or f64, or moments bf16"),
        }
        Ok(())
    }
}

/// Euclidean norm over all gradients, summed in f64 in a fixed order.
pub fn global_norm(gradients: &BTreeMap<String, Tensor>) -> Result<f64> {
    let mut total = 0.0;
    for gradient in gradients.values() {
        total += sum_of_squares(gradient)?;
    }
    Ok(total.sqrt())
}

fn sum_of_squares(x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() && x.dtype() == DType::F32 && x.is_contiguous() {
        let (storage, layout) = x.storage_and_layout();
        if let (candle_core::Storage::Cpu(CpuStorage::F32(data)), Some((from, to))) =
            (&*storage, layout.contiguous_offsets())
        {
            let blocks: Vec<f64> = data[from..to]
                .par_chunks(BLOCK)
                .map(|block| block.iter().map(|&x| x as f64 * x as f64).sum())
                .collect();
            return Ok(blocks.iter().sum());
        }
    }
    Ok(x.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
}

/// What gradients of a global norm are to be multiplied by so that it is at most `max_norm`:
/// `min(1, max_norm / (norm + 1e-6))`.
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
        let mut optimiser = AdamW::new(&variables, AdamWConfig::default()).unwrap();
        let mut gradients: BTreeMap<_, _> = [("a".to_string(), variables["a"].as_tensor().clone())].into();
        let error = optimiser.step(&variables, &gradients, 0.1, 1.0).unwrap_err().to_string();
        assert!(error.contains("`b`"), "{error}");
        gradients.insert("b".into(), variables["b"].as_tensor().clone());
        gradients.insert("c".into(), variables["b"].as_tensor().clone());
        assert!(optimiser.step(&variables, &gradients, 0.1, 1.0).is_err());
        assert_eq!(variables["a"].to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(optimiser.steps(), 0);
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
            let mut optimiser = AdamW::new(&variables, config).unwrap();
            for step in 0..400 {
                let size = if step < 200 { 1.0 } else { 0.1 };
                let gradients =
                    BTreeMap::from([("w".to_string(), Tensor::full(size as f32, n, &Device::Cpu).unwrap())]);
                optimiser.step(&variables, &gradients, 1e-3, 1.0).unwrap();
            }
            let mean = |t: &Tensor| t.to_dtype(DType::F64).unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap();
            let state = optimiser.state();
            (mean(&state["exp_avg_sq.w"]), variables["w"].to_vec1::<f32>().unwrap())
        };
        let ((full, _), (half, weights)) = (run(MomentType::Full), run(MomentType::Bf16));
        // Rounded to the nearest, the second moment would never come down: a step takes off a thousandth.
        assert!((half / full - 1.0).abs() < 0.01, "{half} against {full}");
        assert_eq!(weights, run(MomentType::Bf16).1);
    }
}
