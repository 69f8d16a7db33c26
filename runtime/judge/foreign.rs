//! Language models that this program does not train, through candle-transformers: they can judge.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{
    gemma, helium, olmo, olmo2, phi3, quantized_gemma3, quantized_glm4, quantized_lfm2, quantized_phi, quantized_phi3,
    quantized_qwen2, quantized_qwen3, quantized_qwen3_moe, starcoder2,
};
use rehearsal_lm::Text;
use rehearsal_lm::load::GgufText;
use serde_json::Value;

use super::local::Brain;

/// `model_type`s of Hugging Face directories that are read by [`Foreign`].
pub const KINDS: [&str; 7] = ["phi3", "olmo", "olmo2", "starcoder2", "gemma", "helium", "smollm3"];

/// `general.architecture`s of GGUF files that are read by [`Foreign`]; `llama` is this program's own.
pub const GGUF_KINDS: [&str; 9] = ["qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi2", "phi3", "glm4", "lfm2"];

/// Logits of the token after a row of tokens.
type Forward = Box<dyn FnMut(&Tensor) -> candle_core::Result<Tensor> + Send>;

type Wrong = Box<dyn std::error::Error>;

/// A model of one of [`KINDS`], on the CPU in f32, or of [`GGUF_KINDS`], in the file's own types.
pub struct Foreign {
    fingerprint: String,
    text: Text,
    context: usize,
    forward: Mutex<Forward>,
}

impl Foreign {
    /// Whether a path is a directory with a model of one of [`KINDS`], or a GGUF file with one of [`GGUF_KINDS`].
    pub fn is_one(path: &Path) -> bool {
        if is_gguf(path) {
            return GgufText::open(path).is_ok_and(|file| file.architecture != "llama");
        }
        config(path).is_ok_and(|config| config["model_type"].as_str().is_some_and(|kind| KINDS.contains(&kind)))
    }

    /// Reads a Hugging Face directory or a GGUF file.
    pub fn open(path: &Path) -> Result<Self, String> {
        let read = if is_gguf(path) { Self::read_gguf(path) } else { Self::read(path) };
        read.map_err(|reason| format!("the judge in {}: {reason}", path.display()))
    }

    fn read(directory: &Path) -> Result<Self, Wrong> {
        let config = config(directory)?;
        let file = |name: &str| std::fs::read(directory.join(name)).map_err(|e| format!("{name}: {e}"));
        let template = file("chat_template.jinja").ok().map(|t| String::from_utf8_lossy(&t).into_owned());
        let text = Text::from_json(&file("tokenizer.json")?, file("tokenizer_config.json").ok().as_deref(), template)?;
        let mut hasher = blake3::Hasher::new();
        let mut tensors = std::collections::HashMap::new();
        for path in weights(directory)? {
            let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            hasher.update(&bytes);
            tensors.extend(candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?);
        }
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let context = config["max_position_embeddings"].as_u64().map_or(usize::MAX, |n| n as usize);
        let forward = Mutex::new(forward(&config, vb)?);
        Ok(Self { fingerprint: short(&hasher), text, context, forward })
    }

    fn read_gguf(path: &Path) -> Result<Self, Wrong> {
        let GgufText { architecture, context, text } = GgufText::open(path)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        let mut reader = BufReader::new(File::open(path)?);
        let content = Content::read(&mut reader)?;
        let forward = Mutex::new(gguf_forward(&architecture, content, &mut reader)?);
        Ok(Self { fingerprint: short(&hasher), text, context: context.unwrap_or(usize::MAX), forward })
    }
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|e| e == "gguf")
}

fn short(hasher: &blake3::Hasher) -> String {
    hasher.finalize().to_hex()[..16].to_string()
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
fn forward(config: &Value, vb: VarBuilder<'_>) -> Result<Forward, Wrong> {
    macro_rules! of {
        ($module:ident, $model:ident $(, $flag:expr)?) => {{
            let mut model = $module::$model::new($($flag,)? &serde_json::from_value(config.clone())?, vb)?;
            Ok(Box::new(move |tokens| {
                model.clear_kv_cache();
                model.forward(tokens, 0)
            }))
        }};
    }
    match config["model_type"].as_str().unwrap_or_default() {
        "phi3" => of!(phi3, Model),
        "olmo" => of!(olmo, Model),
        "olmo2" => of!(olmo2, Model),
        "starcoder2" => of!(starcoder2, Model),
        "gemma" => of!(gemma, Model, false),
        "helium" => of!(helium, Model),
        "smollm3" => of!(smollm3, ModelForCausalLM),
        other => Err(format!("`{other}` is no model that can be read").into()),
    }
}

/// The same for the weights of a GGUF file, whose caches begin anew at position 0.
fn gguf_forward(architecture: &str, content: Content, reader: &mut BufReader<File>) -> Result<Forward, Wrong> {
    let (cpu, f32) = (Device::Cpu, DType::F32);
    macro_rules! of {
        ($module:ident, $model:ident, $($argument:expr),*) => {{
            let mut model = $module::$model::from_gguf($($argument),*)?;
            Ok(Box::new(move |tokens| model.forward(tokens, 0)))
        }};
    }
    match architecture {
        "qwen2" => of!(quantized_qwen2, ModelWeights, content, reader, &cpu),
        "qwen3" => {
            let mut model = quantized_qwen3::ModelWeights::from_gguf(content, reader, &cpu)?;
            Ok(Box::new(move |tokens| {
                model.clear_kv_cache();
                model.forward(tokens, 0)
            }))
        }
        "qwen3moe" => of!(quantized_qwen3_moe, GGUFQWenMoE, content, reader, &cpu, f32),
        "gemma2" | "gemma3" => of!(quantized_gemma3, ModelWeights, content, reader, &cpu),
        "phi2" => of!(quantized_phi, ModelWeights, content, reader, &cpu),
        "phi3" => of!(quantized_phi3, ModelWeights, false, content, reader, &cpu),
        "glm4" => of!(quantized_glm4, ModelWeights, content, reader, &cpu, f32),
        "lfm2" => of!(quantized_lfm2, ModelWeights, content, reader, &cpu),
        other => Err(format!("GGUF files of `{other}` cannot judge; {} can", GGUF_KINDS.join(", ")).into()),
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
            let logits = forward(&tokens)?.to_dtype(DType::F32)?;
            // Of all positions or of the last alone: what comes next is at the end.
            let vocab = logits.dim(candle_core::D::Minus1)?;
            let logits = logits.flatten_all()?;
            let logits = logits.narrow(0, logits.dim(0)? - vocab, vocab)?;
            candle_nn::ops::log_softmax(&logits, 0)?.to_vec1()
        };
        let all = run().map_err(|e| e.to_string())?;
        let of = |token: &u32| all.get(*token as usize).copied().ok_or("a token is not in the vocabulary");
        candidates.iter().map(of).collect::<Result<_, _>>().map_err(String::from)
    }
}
