//! Low-rank adapters (LoRA; Hu et al. 2021): `W = W₀ + (α/r) B A`, with `A` `[r, inputs]` and `B` `[outputs, r]`.
//!
//! A decoder runs with its adapters merged: its weights are `W`, updated after each step, and the gradients of `A` and
//! `B` follow from that of `W` by the chain rule. The base weights `W₀` never change, so they can be shared, for
//! example with the reference. Only the adapters have gradients, optimiser state and checkpoints.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use rehearsal_kernels::gemm::{Packed, Precision, gemm};
use rehearsal_kernels::random::{Region, Stream};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::cpu::with_views;
use crate::error::{Error, Result};
use crate::load::file;
use crate::load::{Checkpoint, tensors_of};
use crate::model::{Decoder, HeadKind, Parameters, SCORE_HEAD};

/// Prefix of module names in PEFT's files.
const PREFIX: &str = "base_model.model.";

/// Settings of adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank r.
    pub rank: usize,
    /// α; the product `B A` is scaled by `α / r`.
    pub alpha: f64,
    /// Linear layers with adapters, by the last component of their names (`q_proj`): PEFT's `target_modules`.
    pub targets: Vec<String>,
}

/// The adapters of a model, with the score head if it has one, which is trained in full.
pub struct Lora {
    config: LoraConfig,
    /// Trained variables by PEFT's names.
    variables: BTreeMap<String, Var>,
    /// Names of the model's weights that have adapters.
    adapted: Vec<String>,
    /// Parameter name of the score head, if it is trained too.
    head: Option<&'static str>,
    /// Weights are stored as `[inputs, outputs]` (GPT-2).
    transposed: bool,
}

impl Lora {
    /// Creates adapters that do not change the model yet: `A` is drawn as PyTorch initialises linear layers, `B` is
    /// zero.
    ///
    /// Fails if the rank or α is not positive, or if the model has no linear layer of a target's name.
    pub fn new(base: &Checkpoint, config: LoraConfig, device: &Device, seed: u64) -> Result<Self> {
        let mut lora = Self::empty(base, config)?;
        for (index, name) in lora.adapted.iter().enumerate() {
            let (outputs, inputs) = lora.shape(base, name)?;
            let stream = Stream::in_region(seed, Region::AdapterInit, index as u64);
            let bound = 1.0 / (inputs as f64).sqrt();
            let rank = lora.config.rank;
            let a = (0..(rank * inputs) as u64).map(|i| ((2.0 * stream.uniform(i) - 1.0) * bound) as f32).collect();
            let a = Var::from_tensor(&Tensor::from_vec::<_, f32>(a, (rank, inputs), device)?)?;
            let b = Var::zeros((outputs, rank), DType::F32, device)?;
            lora.variables.insert(peft_name(name, 'A'), a);
            lora.variables.insert(peft_name(name, 'B'), b);
        }
        if let Some(head) = lora.head {
            let weight = base.parameters[head].to_dtype(DType::F32)?.to_device(device)?;
            lora.variables.insert(format!("{PREFIX}{head}"), Var::from_tensor(&weight)?);
        }
        Ok(lora)
    }

    /// Rank, scale and layers.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    fn empty(base: &Checkpoint, config: LoraConfig) -> Result<Self> {
        let wrong = |message: String| Err(Error::Config(message));
        if config.rank == 0 || !(config.alpha > 0.0 && config.alpha.is_finite()) {
            return wrong(format!("LoRA rank {} and alpha {} must both be above 0", config.rank, config.alpha));
        }
        let linear = |name: &String| {
            let module = name.strip_suffix(".weight").and_then(|n| n.rsplit('.').next());
            module.filter(|_| base.parameters[name].rank() == 2).map(String::from)
        };
        let adapted: Vec<String> = base
            .parameters
            .keys()
            .filter(|name| linear(name).is_some_and(|module| config.targets.contains(&module)))
            .cloned()
            .collect();
        if let Some(target) =
            config.targets.iter().find(|t| !adapted.iter().any(|n| n.ends_with(&format!(".{t}.weight"))))
        {
            let has: std::collections::BTreeSet<String> = base.parameters.keys().filter_map(linear).collect();
            let has: Vec<String> = has.into_iter().collect();
            return wrong(format!(
                "LoRA target `{target}` is not a linear layer of the model; its linear layers are {}",
                has.join(", ")
            ));
        }
        let head = (base.architecture.head == HeadKind::Score).then_some(SCORE_HEAD);
        let transposed = base.architecture.model_type == "gpt2";
        Ok(Self { config, variables: BTreeMap::new(), adapted, head, transposed })
    }

    /// Reads adapters in PEFT's format (`adapter_config.json`, `adapter_model.safetensors`).
    ///
    /// Fails if a tensor is missing, does not fit `base` or is not known, or if a setting is not supported.
    pub fn open(base: &Checkpoint, directory: &Path, device: &Device) -> Result<Self> {
        let path = directory.join("adapter_config.json");
        let malformed = |path: &Path, reason: String| Error::Malformed { path: path.into(), reason };
        let bytes = file::read(&path)?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|e| malformed(&path, e.to_string()))?;
        if json["peft_type"].as_str() != Some("LORA") {
            return Err(malformed(&path, format!("peft_type {} is not supported; \"LORA\" is", json["peft_type"])));
        }
        for (key, supported) in [
            ("use_dora", json!(false)),
            ("bias", json!("none")),
            ("rank_pattern", json!({})),
            ("alpha_pattern", json!({})),
        ] {
            if !json[key].is_null() && json[key] != supported {
                return Err(malformed(&path, format!("`{key}` = {} is not supported; {supported} is", json[key])));
            }
        }
        let rank = json["r"].as_u64().unwrap_or(0) as usize;
        let alpha = json["lora_alpha"].as_f64().unwrap_or(0.0);
        // Rank-stabilised scaling divides by the root of the rank.
        let alpha = if json["use_rslora"].as_bool() == Some(true) { alpha * (rank as f64).sqrt() } else { alpha };
        let names = |v: &Value| -> Vec<String> {
            v.as_array().map(|all| all.iter().filter_map(Value::as_str).map(String::from).collect()).unwrap_or_default()
        };
        let path = directory.join("adapter_model.safetensors");
        let bytes = file::read(&path)?;
        let found = tensors_of(&bytes, &path, device)?;
        let mut targets = names(&json["target_modules"]);
        if targets.is_empty() {
            // `target_modules` is a pattern or `all-linear`: take the modules from the names of the tensors.
            let module = |name: &String| Some(name.split(".lora_A").next()?.rsplit('.').next()?.to_string());
            targets = found.keys().filter(|n| n.contains(".lora_A")).filter_map(module).collect();
            targets.sort();
            targets.dedup();
        }
        let mut lora = Self::empty(base, LoraConfig { rank, alpha, targets })?;
        let expected = Self::new(base, lora.config.clone(), device, 0)?.variables;
        for (name, like) in expected {
            let Some(tensor) = found.get(&name).or_else(|| found.get(&name.replace(".weight", ".default.weight")))
            else {
                return Err(Error::MissingTensor { name, path, wanted: like.dims().to_vec() });
            };
            if tensor.dims() != like.dims() {
                let (found, wanted) = (tensor.dims().to_vec(), like.dims().to_vec());
                return Err(Error::Misshapen { name, path, found, wanted });
            }
            lora.variables.insert(name, Var::from_tensor(&tensor.to_dtype(DType::F32)?)?);
        }
        if let Some(name) = found.keys().find(|n| n.contains("lora_") && !lora.variables.contains_key(*n)) {
            let model_type = base.architecture.model_type.clone();
            return Err(Error::ExtraTensor { name: name.clone(), path, model_type });
        }
        Ok(lora)
    }

    /// Trained variables by PEFT's names.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// `(outputs, inputs)` of an adapted layer.
    fn shape(&self, base: &Checkpoint, name: &str) -> Result<(usize, usize)> {
        let (rows, columns) = base.parameters[name].dims2()?;
        Ok(if self.transposed { (columns, rows) } else { (rows, columns) })
    }

    fn pair(&self, name: &str) -> (&Var, &Var) {
        (&self.variables[&peft_name(name, 'A')], &self.variables[&peft_name(name, 'B')])
    }

    fn scale(&self) -> f64 {
        self.config.alpha / self.config.rank as f64
    }

    /// Gradients of the trained variables, by PEFT's names, from those of the model's weights, by the model's names.
    pub fn gradients(&self, mut full: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        let mut gradients = BTreeMap::new();
        for name in &self.adapted {
            let dw = full.remove(name).ok_or_else(|| Error::NoGradient(name.clone()))?;
            let dw = if self.transposed { dw.t()?.contiguous()? } else { dw };
            let (a, b) = self.pair(name);
            let da = (product(&b.as_tensor().t()?.contiguous()?, &dw)? * self.scale())?;
            let db = (product(&dw, &a.as_tensor().t()?.contiguous()?)? * self.scale())?;
            gradients.insert(peft_name(name, 'A'), da);
            gradients.insert(peft_name(name, 'B'), db);
        }
        if let Some(head) = self.head {
            let gradient = full.remove(head).ok_or_else(|| Error::NoGradient(head.into()))?;
            gradients.insert(format!("{PREFIX}{head}"), gradient);
        }
        Ok(gradients)
    }

    /// Weights that differ from the base, in f32 by the model's names: `W₀ + (α/r) B A`, and the score head.
    pub fn merged(&self, base: &Checkpoint, device: &Device) -> Result<Parameters> {
        let mut merged = Parameters::new();
        for name in &self.adapted {
            let (a, b) = self.pair(name);
            let delta = (product(b.as_tensor(), a.as_tensor())? * self.scale())?;
            let delta = if self.transposed { delta.t()?.contiguous()? } else { delta };
            let weight = base.parameters[name].to_dtype(DType::F32)?.to_device(device)?;
            merged.insert(name.clone(), (weight + delta)?);
        }
        if let Some(head) = self.head {
            merged.insert(head.into(), self.variables[&format!("{PREFIX}{head}")].as_detached_tensor());
        }
        Ok(merged)
    }

    /// Sets a decoder's weights to the [merged](Self::merged) ones.
    pub fn apply(&self, base: &Checkpoint, decoder: &Decoder) -> Result<()> {
        for (name, weight) in self.merged(base, decoder.device())? {
            if let Some(var) = decoder.variables().get(&name) {
                var.set(&weight)?;
            }
        }
        Ok(())
    }

    /// Writes adapters in PEFT's format.
    pub fn save(&self, base: &Checkpoint, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).map_err(|source| Error::Write { path: directory.into(), source })?;
        let task = if self.head.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" };
        let config = json!({
            "peft_type": "LORA", "task_type": task, "r": self.config.rank, "lora_alpha": self.config.alpha,
            "target_modules": self.config.targets, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": self.transposed,
            "modules_to_save": self.head.map(|_| vec!["score"]), "inference_mode": true,
            "base_model_name_or_path": base.config.get("_name_or_path").and_then(Value::as_str),
        });
        let path = directory.join("adapter_config.json");
        let bytes = serde_json::to_vec_pretty(&config).map_err(|e| Error::Config(e.to_string()))?;
        fs::write(&path, bytes).map_err(|source| Error::Write { path, source })?;
        let tensors: Vec<(String, Tensor)> = self
            .variables
            .iter()
            .map(|(name, var)| Ok((name.clone(), var.as_detached_tensor().to_device(&Device::Cpu)?)))
            .collect::<Result<_>>()?;
        let path = directory.join("adapter_model.safetensors");
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        ::safetensors::serialize_to_file(tensors.iter().map(|(n, t)| (n, t)), Some(metadata), &path)
            .map_err(|e| Error::Malformed { path, reason: e.to_string() })
    }
}

/// PEFT's name of an adapter of a weight.
fn peft_name(weight: &str, which: char) -> String {
    format!("{PREFIX}{}.lora_{which}.weight", weight.trim_end_matches(".weight"))
}

/// `a · b`; on the CPU by [`gemm`], whose results do not depend on the number of threads.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !a.device().is_cpu() {
        return Ok(a.matmul(b)?);
    }
    Ok(with_views::<f32, _>(&[a, b], |views| {
        let (rows, columns) = (views[0].shape().0, views[1].shape().1);
        let mut out = vec![0.0; rows * columns];
        gemm(views[0], &Packed::new(views[1], Precision::F32), &mut out, false);
        Tensor::from_vec(out, (rows, columns), &Device::Cpu)
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Batch, Gradients, Sequence};
    use crate::testing;

    fn config(targets: &[&str]) -> LoraConfig {
        LoraConfig { rank: 2, alpha: 8.0, targets: targets.iter().map(|t| t.to_string()).collect() }
    }

    fn floats(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn new_adapters_change_nothing_and_come_back_from_peft_files() {
        let base = testing::checkpoint();
        let lora = Lora::new(&base, config(&["q_proj", "down_proj"]), &Device::Cpu, 1).unwrap();
        for (name, weight) in lora.merged(&base, &Device::Cpu).unwrap() {
            assert_eq!(floats(&weight), floats(&base.parameters[&name]), "{name}");
        }
        for var in lora.variables().values() {
            var.set(&(var.as_tensor() + 0.25).unwrap()).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        lora.save(&base, folder.path()).unwrap();
        let read = Lora::open(&base, folder.path(), &Device::Cpu).unwrap();
        assert_eq!(read.variables().len(), lora.variables().len());
        for (name, var) in lora.variables() {
            assert_eq!(floats(var), floats(&read.variables()[name]), "{name}");
        }
    }

    #[test]
    fn gradients_are_those_of_the_factors() {
        let base = testing::checkpoint();
        let lora = Lora::new(&base, config(&["v_proj"]), &Device::Cpu, 1).unwrap();
        for (name, var) in lora.variables() {
            let stream = Stream::new(3, name.len() as u64);
            let data: Vec<f32> = (0..var.elem_count() as u64).map(|i| 0.1 * stream.normal(i) as f32).collect();
            var.set(&Tensor::from_vec(data, var.dims(), &Device::Cpu).unwrap()).unwrap();
        }
        let decoder = base.trainable(&Device::Cpu, DType::F32).unwrap();
        let batch = Batch::new([Sequence { prompt: &[1, 2, 3], completion: &[4, 5, 6] }]);
        let loss = || {
            lora.apply(&base, &decoder).unwrap();
            decoder.logprobs(&batch, 1.0).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
        };
        loss();
        let forward = decoder.forward(&batch, 1.0).unwrap();
        let ones = forward.output().ones_like().unwrap();
        let mut gradients = Gradients::default();
        forward.backward(&ones, &mut gradients).unwrap();
        let gradients = lora.gradients(gradients.complete(&decoder).unwrap()).unwrap();
        for (name, var) in lora.variables() {
            let before = floats(var);
            for at in [0, before.len() / 2, before.len() - 1] {
                let moved = |by: f32| {
                    let mut x = before.clone();
                    x[at] += by;
                    var.set(&Tensor::from_vec(x, var.dims(), &Device::Cpu).unwrap()).unwrap();
                    loss()
                };
                let slope = (moved(0.02) - moved(-0.02)) / 0.04;
                let exact = floats(&gradients[name])[at];
                assert!(
                    (slope - exact).abs() < 2e-2 * (1.0 + exact.abs()),
                    "{name}[{at}]: {exact}, by differences {slope}"
                );
            }
            var.set(&Tensor::from_vec(before, var.dims(), &Device::Cpu).unwrap()).unwrap();
        }
    }

    #[test]
    fn adapters_that_do_not_fit_are_named() {
        let base = testing::checkpoint();
        let error = Lora::new(&base, config(&["c_attn"]), &Device::Cpu, 1).err().unwrap().to_string();
        assert!(error.contains("`c_attn`") && error.contains("q_proj"), "{error}");
        let lora = Lora::new(&base, config(&["q_proj"]), &Device::Cpu, 1).unwrap();
        let folder = tempfile::tempdir().unwrap();
        lora.save(&base, folder.path()).unwrap();
        let mut wider = testing::checkpoint();
        let name = "model.layers.0.self_attn.q_proj.weight";
        let wide = Tensor::zeros((8, 12), DType::F32, &Device::Cpu).unwrap();
        wider.parameters.insert(name.into(), wide);
        let error = Lora::open(&wider, folder.path(), &Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("q_proj.lora_") && error.contains("shape"), "{error}");
    }
}
