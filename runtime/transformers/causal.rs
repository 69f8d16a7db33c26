//! Causal language models: next-token log-probabilities from a Hugging Face directory or a GGUF file.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::gguf_file::Content;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{
    gemma, helium, olmo, olmo2, phi3, quantized_gemma3, quantized_glm4, quantized_lfm2, quantized_phi, quantized_phi3,
    quantized_qwen2, quantized_qwen3, quantized_qwen3_moe, starcoder2,
};
use rehearsal_actors::Devices;
use rehearsal_lm::Text;
use rehearsal_lm::load::GgufText;

use super::cpu::on_cpu;
use super::directory::{Directory, Weights, fingerprint};

/// Values of `model_type` in Hugging Face directories that [`CausalModel`] supports.
pub const MODEL_TYPES: [&str; 7] = ["phi3", "olmo", "olmo2", "starcoder2", "gemma", "helium", "smollm3"];

/// Values of `general.architecture` in GGUF files that [`CausalModel`] supports. `llama` is not among them: the `lm`
/// crate reads it.
pub const GGUF_ARCHITECTURES: [&str; 9] =
    ["qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi2", "phi3", "glm4", "lfm2"];

/// Forward pass from an empty KV cache: token ids `[1, tokens]` to logits of the last position, or of all.
type Forward = Box<dyn FnMut(&Tensor) -> candle_core::Result<Tensor> + Send>;

type BoxError = Box<dyn std::error::Error>;

/// A causal language model with its tokenizer: one of [`MODEL_TYPES`] in f32, or one of [`GGUF_ARCHITECTURES`] in the
/// types of its file. Forward passes take turns, because a model keeps its KV cache inside.
pub struct CausalModel {
    fingerprint: String,
    text: Text,
    context: usize,
    forward: Mutex<Forward>,
}

impl CausalModel {
    /// Whether `path` is a directory or a GGUF file that is read by candle-transformers instead of the `lm` crate.
    pub fn supports(path: &Path) -> bool {
        if is_gguf(path) {
            return GgufText::open(path).is_ok_and(|file| file.architecture != "llama");
        }
        Directory::open(path).is_ok_and(|directory| MODEL_TYPES.contains(&directory.model_type()))
    }

    /// Reads a Hugging Face directory (`config.json`, `tokenizer.json`, `*.safetensors`) or a `.gguf` file. A chat template
    /// that prints the date prints `day`, in days after 1 January 1970.
    pub fn open(path: &Path, day: Option<u32>) -> Result<Self, String> {
        let read = if is_gguf(path) { Self::read_gguf(path) } else { Self::read_directory(path) };
        let mut model = read.map_err(|reason| format!("the judge in {}: {reason}", path.display()))?;
        if let Some(day) = day {
            model.text = model.text.with_day(day);
        }
        Ok(model)
    }

    fn read_directory(path: &Path) -> Result<Self, BoxError> {
        let directory = Directory::open(path)?;
        let template = directory.read("chat_template.jinja").ok().map(|t| String::from_utf8_lossy(&t).into_owned());
        let tokenizer_config = directory.read("tokenizer_config.json").ok();
        let text = Text::from_json(&directory.read("tokenizer.json")?, tokenizer_config.as_deref(), template)?;
        let Weights { tensors, fingerprint } = Weights::read(&directory.shards()?)?;
        let context = directory.config["max_position_embeddings"].as_u64().map_or(usize::MAX, |n| n as usize);
        Ok(Self { fingerprint, text, context, forward: Mutex::new(forward(&directory, tensors)?) })
    }

    fn read_gguf(path: &Path) -> Result<Self, BoxError> {
        let GgufText { architecture, context, text } = GgufText::open(path)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        let mut reader = BufReader::new(File::open(path)?);
        let content = Content::read(&mut reader)?;
        let forward = Mutex::new(gguf_forward(&architecture, content, &mut reader)?);
        Ok(Self { fingerprint: fingerprint(&hasher), text, context: context.unwrap_or(usize::MAX), forward })
    }

    /// First 16 hex digits of a hash of the weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Tokenizer and chat template.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// Longest sequence in tokens; `usize::MAX` if the files name none.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Log-probabilities of each of `candidates` as the token after `prompt`, normalised over the whole vocabulary.
    pub fn next_token_logprobs(
        &self,
        prompt: &[u32],
        candidates: &[u32],
        devices: &Devices,
    ) -> Result<Vec<f32>, String> {
        let logprobs: Vec<f32> = on_cpu(devices, || {
            let mut forward = self.forward.lock().unwrap_or_else(PoisonError::into_inner);
            let tokens = Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?;
            let logits = forward(&tokens)?.to_dtype(DType::F32)?;
            // Some architectures return logits of all positions, others of the last one: the last row is the same.
            let vocab = logits.dim(D::Minus1)?;
            let logits = logits.flatten_all()?;
            let logits = logits.narrow(0, logits.dim(0)? - vocab, vocab)?;
            candle_nn::ops::log_softmax(&logits, 0)?.to_vec1()
        })?;
        let of = |token: &u32| logprobs.get(*token as usize).copied().ok_or("a token is not in the vocabulary");
        candidates.iter().map(of).collect::<Result<_, _>>().map_err(String::from)
    }
}

fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|e| e == "gguf")
}

/// Builds the model of a directory. Each call of the result clears the KV cache first.
fn forward(directory: &Directory, vb: VarBuilder<'static>) -> Result<Forward, BoxError> {
    macro_rules! model {
        ($module:ident, $model:ident $(, $flag:expr)?) => {{
            let mut model = $module::$model::new($($flag,)? &directory.parsed()?, vb)?;
            Ok(Box::new(move |tokens| {
                model.clear_kv_cache();
                model.forward(tokens, 0)
            }))
        }};
    }
    match directory.model_type() {
        "phi3" => model!(phi3, Model),
        "olmo" => model!(olmo, Model),
        "olmo2" => model!(olmo2, Model),
        "starcoder2" => model!(starcoder2, Model),
        "gemma" => model!(gemma, Model, false),
        "helium" => model!(helium, Model),
        "smollm3" => model!(smollm3, ModelForCausalLM),
        other => {
            let known = MODEL_TYPES.join(", ");
            Err(format!("`model_type` is `{other}`, which cannot be read; these can: {known}").into())
        }
    }
}

/// Builds the model of a GGUF file. Its KV cache starts again at position 0.
fn gguf_forward(architecture: &str, content: Content, reader: &mut BufReader<File>) -> Result<Forward, BoxError> {
    let (cpu, f32) = (Device::Cpu, DType::F32);
    macro_rules! model {
        ($module:ident, $model:ident, $($argument:expr),*) => {{
            let mut model = $module::$model::from_gguf($($argument),*)?;
            Ok(Box::new(move |tokens| model.forward(tokens, 0)))
        }};
    }
    match architecture {
        "qwen2" => model!(quantized_qwen2, ModelWeights, content, reader, &cpu),
        "qwen3" => {
            let mut model = quantized_qwen3::ModelWeights::from_gguf(content, reader, &cpu)?;
            Ok(Box::new(move |tokens| {
                model.clear_kv_cache();
                model.forward(tokens, 0)
            }))
        }
        "qwen3moe" => model!(quantized_qwen3_moe, GGUFQWenMoE, content, reader, &cpu, f32),
        "gemma2" | "gemma3" => model!(quantized_gemma3, ModelWeights, content, reader, &cpu),
        "phi2" => model!(quantized_phi, ModelWeights, content, reader, &cpu),
        "phi3" => model!(quantized_phi3, ModelWeights, false, content, reader, &cpu),
        "glm4" => model!(quantized_glm4, ModelWeights, content, reader, &cpu, f32),
        "lfm2" => model!(quantized_lfm2, ModelWeights, content, reader, &cpu),
        other => {
            let known = GGUF_ARCHITECTURES.join(", ");
            Err(format!("a GGUF file of architecture `{other}` cannot be a judge; these can: {known}").into())
        }
    }
}
