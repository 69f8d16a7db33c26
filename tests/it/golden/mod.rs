//! Expected values and gradients from independent implementations (`tests/golden/SCHEMA.md` says which).
//!
//! `REHEARSAL_GOLDEN` names another folder with the same files and other numbers.

mod evaluation;
mod head;
mod models;
mod objectives;
mod optimiser;
mod policy_gradient;
mod preferences;
mod reference;
mod reward_models;
mod rewards;
mod sampling;
mod steps;

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

pub fn folder() -> PathBuf {
    match std::env::var_os("REHEARSAL_GOLDEN") {
        Some(folder) => folder.into(),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

/// One golden file.
pub struct Golden {
    name: String,
    pub value: Value,
}

impl Golden {
    pub fn load(name: &str) -> Self {
        let path = folder().join(format!("{name}.json"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { name: name.into(), value: serde_json::from_slice(&bytes).expect("JSON") }
    }

    pub fn param(&self, key: &str) -> f64 {
        self.value["params"][key].as_f64().unwrap_or_else(|| panic!("{}: no number `{key}`", self.name))
    }

    /// A parameter that may be null.
    pub fn option(&self, key: &str) -> Option<f64> {
        self.value["params"][key].as_f64()
    }

    /// Integers of an input.
    pub fn integers(&self, key: &str) -> Vec<usize> {
        numbers(&self.value["inputs"][key]).iter().map(|&x| x as usize).collect()
    }

    pub fn param_text(&self, key: &str) -> &str {
        self.value["params"][key].as_str().unwrap_or_default()
    }

    pub fn input(&self, key: &str, dtype: DType) -> Tensor {
        tensor(&self.value["inputs"][key], dtype)
    }

    pub fn has_input(&self, key: &str) -> bool {
        !self.value["inputs"][key].is_null()
    }

    pub fn output(&self, key: &str) -> Vec<f64> {
        numbers(&self.value["outputs"][key])
    }

    /// Compares at the file's own tolerance for the type of `got`.
    pub fn check(&self, key: &str, got: &Tensor) {
        let single = got.dtype() != DType::F64;
        let got = flat(got);
        self.check_values(key, &got, &self.output(key), single);
    }

    pub fn check_numbers(&self, key: &str, got: &[f64], single: bool) {
        self.check_values(key, got, &self.output(key), single);
    }

    pub fn check_values(&self, what: &str, got: &[f64], want: &[f64], single: bool) {
        assert!(!want.is_empty(), "{}: nothing to compare `{what}` with", self.name);
        assert_eq!(got.len(), want.len(), "{}: {what}", self.name);
        let suffix = if single { "_f32" } else { "" };
        let tolerance = |key: &str| self.value["tol"][format!("{key}{suffix}")].as_f64().expect("a tolerance");
        let (rtol, atol) = (tolerance("rtol"), tolerance("atol"));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((g - w).abs() <= atol + rtol * w.abs(), "{}: {what}[{i}]: got {g}, want {w}", self.name);
        }
    }

    /// Compares named gradients with their norms, sums and sampled entries.
    pub fn check_gradients(&self, key: &str, got: &std::collections::BTreeMap<String, Tensor>, single: bool) {
        let want = self.value["outputs"][key].as_object().expect("a map of gradients");
        assert_eq!(want.len(), got.len(), "{}: {key}: number of parameters", self.name);
        for (name, want) in want {
            let got = flat(&got[name]);
            let sampled: Vec<f64> = numbers(&want["index"]).iter().map(|&i| got[i as usize]).collect();
            self.check_values(&format!("{key}.{name}"), &sampled, &numbers(&want["value"]), single);
            let norm = got.iter().map(|x| x * x).sum::<f64>().sqrt();
            self.check_values(&format!("{key}.{name}.norm"), &[norm], &numbers(&want["norm"]), single);
            self.check_values(&format!("{key}.{name}.sum"), &[got.iter().sum()], &numbers(&want["sum"]), single);
        }
    }
}

/// A tensor of the schema: `{"shape", "dtype", "data"}`.
pub fn tensor(value: &Value, dtype: DType) -> Tensor {
    let shape: Vec<usize> =
        value["shape"].as_array().expect("a shape").iter().map(|n| n.as_u64().unwrap() as usize).collect();
    Tensor::from_vec(numbers(value), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// The numbers of a tensor, or the one number of a scalar.
pub fn numbers(value: &Value) -> Vec<f64> {
    match value["data"].as_array() {
        Some(data) => data.iter().map(|x| x.as_f64().unwrap()).collect(),
        None => value.as_f64().into_iter().collect(),
    }
}

/// Integers of a two-dimensional tensor, row by row.
pub fn rows(value: &Value) -> Vec<Vec<u32>> {
    let columns = value["shape"][1].as_u64().unwrap() as usize;
    numbers(value).chunks(columns).map(|row| row.iter().map(|&x| x as u32).collect()).collect()
}

pub fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The kept elements of a padded tensor as one packed axis, with where each row lies on it.
pub struct Packing {
    index: Tensor,
    pub spans: Vec<usize>,
    kept: Vec<bool>,
}

impl Packing {
    pub fn new(golden: &Golden, mask: &str) -> Self {
        let mask = rows(&golden.value["inputs"][mask]);
        let kept: Vec<bool> = mask.iter().flatten().map(|&m| m == 1).collect();
        let index: Vec<u32> = (0..kept.len() as u32).filter(|&i| kept[i as usize]).collect();
        let mut spans = vec![0];
        for row in &mask {
            spans.push(spans[spans.len() - 1] + row.iter().filter(|&&m| m == 1).count());
        }
        Self { index: Tensor::new(index, &Device::Cpu).unwrap(), spans, kept }
    }

    /// What a batch of these rows holds.
    pub fn whole(&self) -> rehearsal_learn::BatchTotals {
        rehearsal_learn::BatchTotals { sequences: self.spans.len() - 1, tokens: self.spans[self.spans.len() - 1] }
    }

    pub fn pack(&self, padded: &Tensor) -> Tensor {
        padded.flatten_all().unwrap().index_select(&self.index, 0).unwrap()
    }

    /// The kept values of each row.
    pub fn rows(&self, padded: &Tensor) -> Vec<Vec<f64>> {
        let packed = flat(&self.pack(padded));
        self.spans.windows(2).map(|w| packed[w[0]..w[1]].to_vec()).collect()
    }

    /// Compares packed values with a padded output, which is zero elsewhere.
    pub fn check(&self, golden: &Golden, key: &str, packed: &[f64], single: bool) {
        let mut next = packed.iter();
        let padded: Vec<f64> =
            self.kept.iter().map(|&kept| if kept { *next.next().expect("a value") } else { 0.0 }).collect();
        golden.check_numbers(key, &padded, single);
    }
}

/// The types every objective is checked in.
pub const TYPES: [DType; 2] = [DType::F64, DType::F32];
