//! Language models that this program does not train, through candle-transformers: they can judge.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{gemma, olmo2, phi3, starcoder2};
use rehearsal_lm::Text;
use serde_json::Value;

use super::local::Brain;

/// `model_type`s of Hugging Face directories that are read by [`Foreign`].
pub const KINDS: [&str; 4] = ["phi3", "olmo2", "starcoder2", "gemma"];

/// Logits of the token after a row of tokens.
type Forward = Box<dyn FnMut(&Tensor) -> candle_core::Result<Tensor> + Send>;

/// A model of one of [`KINDS`], on the CPU in f32.
pub struct Foreign {
    fingerprint: String,
    text: Text,
    context: usize,
    forward: Mutex<Forward>,
}

impl Foreign {
    /// Whether a path is a directory with a model of one of [`KINDS`].
    pub fn is_one(path: &Path) -> bool {
        config(path).is_ok_and(|config| config["model_type"].as_str().is_some_and(|kind| KINDS.contains(&kind)))
    }

    /// Reads a Hugging Face directory.
    pub fn open(directory: &Path) -> Result<Self, String> {
        Self::read(directory).map_err(|reason| format!("the judge in {}: {reason}", directory.display()))
    }

    fn read(directory: &Path) -> Result<Self, String> {
        let config = config(directory)?;
        let file = |name: &str| std::fs::read(directory.join(name)).map_err(|e| format!("{name}: {e}"));
        let template = file("chat_template.jinja").ok().map(|t| String::from_utf8_lossy(&t).into_owned());
        let text = Text::from_json(&file("tokenizer.json")?, file("tokenizer_config.json").ok().as_deref(), template)
            .map_err(|e| e.to_string())?;
        let mut hasher = blake3::Hasher::new();
        let mut tensors = std::collections::HashMap::new();
        for path in weights(directory)? {
            let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            hasher.update(&bytes);
            tensors.extend(candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|e| e.to_string())?);
        }
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let context = config["max_position_embeddings"].as_u64().map_or(usize::MAX, |n| n as usize);
        let forward = forward(&config, vb).map_err(|e| e.to_string())?;
        let fingerprint = hasher.finalize().to_hex()[..16].to_string();
        Ok(Self { fingerprint, text, context, forward: Mutex::new(forward) })
    }
}

fn config(directory: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(directory.join("config.json")).map_err(|e| format!("config.json: {e}"))?;
    serde_json::from_str(&text).map_err(|e| format!("config.json: {e}"))
}

fn weights(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(directory).map_err(|e| e.to_string())?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    if files.is_empty() { Err("there is no .safetensors file".into()) } else { Ok(files) }
}

/// Each question is asked from an empty cache.
fn forward(config: &Value, vb: VarBuilder<'_>) -> Result<Forward, Box<dyn std::error::Error>> {
    macro_rules! of {
        ($module:ident $(, $flag:expr)?) => {{
            let mut model = $module::Model::new($($flag,)? &serde_json::from_value(config.clone())?, vb)?;
            Ok(Box::new(move |tokens| {
                model.clear_kv_cache();
                model.forward(tokens, 0)
            }))
        }};
    }
    match config["model_type"].as_str().unwrap_or_default() {
        "phi3" => of!(phi3),
        "olmo2" => of!(olmo2),
        "starcoder2" => of!(starcoder2),
        "gemma" => of!(gemma, false),
        other => Err(format!("`{other}` is no model that can be read").into()),
    }
}

impl Brain for Foreign {
    fn fingerprint(&self) -> Result<String, String> {
        Ok(self.fingerprint.clone())
    }

    fn text(&self) -> &Text {
        &self.text
    }

    fn context(&self) -> usize {
        self.context
    }

    fn next(&self, prompt: &[u32], candidates: &[u32]) -> Result<Vec<f32>, String> {
        let mut forward = self.forward.lock().unwrap_or_else(PoisonError::into_inner);
        let mut run = || -> candle_core::Result<Vec<f32>> {
            let tokens = Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?;
            let logits = forward(&tokens)?.flatten_all()?.to_dtype(DType::F32)?;
            candle_nn::ops::log_softmax(&logits, 0)?.to_vec1()
        };
        let all = run().map_err(|e| e.to_string())?;
        let of = |token: &u32| all.get(*token as usize).copied().ok_or("a token is not in the vocabulary");
        candidates.iter().map(of).collect::<Result<_, _>>().map_err(String::from)
    }
}
