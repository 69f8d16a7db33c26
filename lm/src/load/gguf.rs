//! GGUF files: weights dequantised to f32, tokenizer and chat template.

use std::fs::File;
use std::io::{BufReader, Seek as _};
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};

use super::check::check;
use super::checkpoint::Checkpoint;
use super::gguf_tokenizer::tokenizer;
use super::{file, gguf_header};
use crate::error::{Error, Result};
use crate::model::{Architecture, LANGUAGE_HEAD, Parameters, Position, Rope, Scaling};
use crate::text::Text;

/// Typed access to the metadata of a GGUF file; errors name the file and the key.
pub(super) struct Metadata<'a> {
    content: &'a Content,
    path: &'a Path,
}

impl Metadata<'_> {
    pub fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::Malformed { path: self.path.into(), reason: reason.into() }
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub fn needed(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| self.malformed(format!("metadata key `{key}` is missing")))
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(|v| v.to_string().ok()).map(String::as_str)
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::F32(x) => Some(*x as f64),
            Value::F64(x) => Some(*x),
            other => other.to_u64().ok().map(|x| x as f64),
        }
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.needed(key)?;
        self.number(key)
            .map(|x| x as usize)
            .ok_or_else(|| self.malformed(format!("metadata key `{key}` is not a number")))
    }

    pub fn token(&self, name: &str) -> Option<u32> {
        self.number(&format!("tokenizer.ggml.{name}_token_id")).map(|x| x as u32)
    }
}

/// Metadata of a GGUF file of any architecture, without its weights.
pub struct GgufText {
    /// `general.architecture`.
    pub architecture: String,
    /// Longest sequence in tokens, if the file gives one.
    pub context: Option<usize>,
    /// Tokenizer and chat template: those of `tokenizer.json` (and `tokenizer_config.json`) in the same directory, if
    /// there is one, else the file's own.
    pub text: Text,
}

impl GgufText {
    /// Reads the metadata of a file.
    pub fn open(path: &Path) -> Result<Self> {
        let (content, _) = read(path)?;
        let metadata = Metadata { content: &content, path };
        let architecture = metadata.text("general.architecture").unwrap_or_default().to_string();
        let context = metadata.number(&format!("{architecture}.context_length")).map(|n| n as usize);
        let beside = |name: &str| std::fs::read(path.with_file_name(name)).ok();
        let text = match beside("tokenizer.json") {
            Some(tokenizer) => {
                let template = metadata.text("tokenizer.chat_template").map(String::from);
                Text::from_json(&tokenizer, beside("tokenizer_config.json").as_deref(), template)?
            }
            None => {
                let (tokenizer, config) = tokenizer(&metadata)?;
                Text::from_json(tokenizer.as_bytes(), Some(config.to_string().as_bytes()), None)?
            }
        };
        Ok(Self { architecture, context, text })
    }
}

/// Reads the header of a file.
fn read(path: &Path) -> Result<(Content, BufReader<File>)> {
    let malformed = |reason: String| Error::Malformed { path: path.into(), reason };
    let mut reader = BufReader::new(file::open(path)?);
    gguf_header::check(&mut reader).map_err(malformed)?;
    reader.rewind().map_err(|source| Error::Read { path: path.into(), source })?;
    let content = Content::read(&mut reader).map_err(|e| malformed(e.to_string()))?;
    Ok((content, reader))
}

pub fn open(path: &Path) -> Result<Checkpoint> {
    let (content, mut reader) = read(path)?;
    let malformed = |e: candle_core::Error| Error::Malformed { path: path.into(), reason: e.to_string() };
    let metadata = Metadata { content: &content, path };
    // Validate it like a config.json.
    let architecture =
        Architecture::from_json(&architecture(&metadata)?.to_json()).map_err(|e| metadata.malformed(e.to_string()))?;

    let mut parameters = Parameters::new();
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    for name in names {
        // Frequencies of scaled RoPE; the architecture has them as settings.
        if name == "rope_freqs.weight" {
            continue;
        }
        let tensor = content
            .tensor(&mut reader, name, &Device::Cpu)
            .and_then(|t| t.dequantize(&Device::Cpu))
            .map_err(malformed)?;
        let Some(hf) = hf_name(name) else {
            return Err(metadata.malformed(format!("tensor `{name}` is not part of a llama model")));
        };
        let tensor = match name.rsplit('.').nth(1) {
            Some("attn_q") => deinterleave(&tensor, architecture.heads)?,
            Some("attn_k") => deinterleave(&tensor, architecture.kv_heads)?,
            _ => tensor,
        };
        parameters.insert(hf, tensor);
    }
    let (tokenizer, config) = tokenizer(&metadata)?;
    let text = Text::from_json(tokenizer.as_bytes(), Some(config.to_string().as_bytes()), None)?;
    let parameters = check(&architecture, parameters, path)?;
    Ok(Checkpoint { config: architecture.to_json(), architecture, parameters, text })
}

fn architecture(metadata: &Metadata<'_>) -> Result<Architecture> {
    let kind = metadata.text("general.architecture").unwrap_or_default();
    if kind != "llama" {
        return Err(metadata.malformed(format!("architecture `{kind}` is not supported; `llama` is")));
    }
    let key = |name: &str| format!("llama.{name}");
    let heads = metadata.size(&key("attention.head_count"))?;
    let hidden = metadata.size(&key("embedding_length"))?;
    let kv_heads = metadata.number(&key("attention.head_count_kv")).map_or(heads, |n| n as usize);
    if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
        return Err(metadata.malformed(format!("{kv_heads} key heads do not divide {heads} query heads")));
    }
    let context = metadata.size(&key("context_length"))?;
    let scaling = match metadata.text(&key("rope.scaling.type")) {
        None | Some("none") if metadata.content.tensor_infos.contains_key("rope_freqs.weight") => Scaling::Llama3 {
            factor: metadata.number(&key("rope.scaling.factor")).unwrap_or(if context > 131_071 { 8.0 } else { 1.0 }),
            low: 1.0,
            high: 4.0,
            original_context: 8192.0,
        },
        None | Some("none") => Scaling::None,
        Some("linear") => Scaling::Linear { factor: metadata.number(&key("rope.scaling.factor")).unwrap_or(1.0) },
        Some(other) => return Err(metadata.malformed(format!("rope scaling `{other}` is not supported"))),
    };
    let vocab = match metadata.get("tokenizer.ggml.tokens") {
        Some(tokens) => tokens.to_vec().map_err(|e| metadata.malformed(e.to_string()))?.len(),
        None => metadata.size(&key("vocab_size"))?,
    };
    Ok(Architecture {
        model_type: "llama".into(),
        vocab,
        hidden,
        layers: metadata.size(&key("block_count"))?,
        heads,
        kv_heads,
        head_dim: metadata.number(&key("attention.key_length")).map_or(hidden / heads, |n| n as usize),
        mlp: metadata.size(&key("feed_forward_length"))?,
        // Stored in f32, where 1e-5 is 0.000009999999747: round to seven digits.
        norm_eps: metadata
            .number(&key("attention.layer_norm_rms_epsilon"))
            .map_or(1e-5, |eps| format!("{eps:.6e}").parse().unwrap_or(eps)),
        position: Position::Rotary {
            rope: Rope { theta: metadata.number(&key("rope.freq_base")).unwrap_or(10_000.0), scaling },
            sliding: None,
        },
        context,
        tied: !metadata.content.tensor_infos.contains_key("output.weight"),
        qkv_bias: metadata.content.tensor_infos.contains_key("blk.0.attn_q.bias"),
        output_bias: metadata.content.tensor_infos.contains_key("blk.0.attn_output.bias"),
        bos: metadata.token("bos"),
        eos: metadata.token("eos").into_iter().chain(metadata.token("eot")).collect(),
        pad: metadata.token("padding"),
        ..Architecture::default()
    })
}

fn hf_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some(LANGUAGE_HEAD.into()),
        _ => {}
    }
    let mut parts = name.strip_prefix("blk.")?.splitn(3, '.');
    let (layer, part, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let part = match part {
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

/// Reorders rows from llama.cpp's interleaved rotary pairs to Hugging Face's order: the first elements of all pairs,
/// then the second.
fn deinterleave(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let dims = tensor.dims().to_vec();
    let (rows, columns) = (dims[0], dims[1..].iter().product::<usize>());
    let split = tensor.reshape((heads, rows / heads / 2, 2, columns))?;
    Ok(split.transpose(1, 2)?.contiguous()?.reshape(dims)?)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

    use super::*;
    use crate::testing;

    /// The inverse of [`deinterleave`].
    fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
        let dims = tensor.dims().to_vec();
        let (rows, columns) = (dims[0], dims[1..].iter().product::<usize>());
        let split = tensor.reshape((heads, 2, rows / heads / 2, columns)).unwrap();
        split.transpose(1, 2).unwrap().contiguous().unwrap().reshape(dims).unwrap()
    }

    fn gguf_name(name: &str) -> String {
        let name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd");
        let name = name.replace("model.norm", "output_norm").replace("input_layernorm", "attn_norm");
        let name =
            name.replace("post_attention_layernorm", "ffn_norm").replace("self_attn.", "attn_").replace("mlp.", "ffn_");
        name.replace("attn_o_proj", "attn_output").replace("_proj", "")
    }

    fn strings(all: &[&str]) -> Value {
        Value::Array(all.iter().map(|s| Value::String(s.to_string())).collect())
    }

    /// The test model as a GGUF file with the given tokenizer.
    fn written(path: &Path, tokenizer: Vec<(&str, Value)>) -> Checkpoint {
        let model = testing::checkpoint();
        let a = &model.architecture;
        let number = |n: usize| Value::U32(n as u32);
        let mut metadata = vec![
            ("general.architecture", Value::String("llama".into())),
            ("llama.embedding_length", number(a.hidden)),
            ("llama.block_count", number(a.layers)),
            ("llama.attention.head_count", number(a.heads)),
            ("llama.attention.head_count_kv", number(a.kv_heads)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.feed_forward_length", number(a.mlp)),
            ("llama.context_length", number(a.context)),
            ("tokenizer.ggml.bos_token_id", number(28)),
            ("tokenizer.ggml.eos_token_id", number(29)),
        ];
        metadata.extend(tokenizer);
        let tensors: Vec<(String, QTensor)> = model
            .parameters
            .iter()
            .map(|(name, t)| {
                let t = match name {
                    n if n.contains("q_proj") => interleave(t, a.heads),
                    n if n.contains("k_proj") => interleave(t, a.kv_heads),
                    _ => t.clone(),
                };
                (gguf_name(name), QTensor::quantize(&t, GgmlDType::F32).unwrap())
            })
            .collect();
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
        model
    }

    fn kinds(control: &[usize]) -> Value {
        Value::Array((0..30).map(|i| Value::I32(if control.contains(&i) { 3 } else { 1 })).collect())
    }

    #[test]
    fn weights_and_byte_level_tokenizer_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let mut tokens: Vec<String> = ('a'..='z').map(String::from).collect();
        tokens.extend(["Ġ", "ab", "<s>", "</s>"].map(String::from));
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let model = written(
            &path,
            vec![
                ("tokenizer.ggml.model", Value::String("gpt2".into())),
                ("tokenizer.ggml.tokens", strings(&tokens)),
                ("tokenizer.ggml.token_type", kinds(&[28, 29])),
                ("tokenizer.ggml.merges", strings(&["a b"])),
                ("tokenizer.chat_template", Value::String("{{ bos_token }}{{ messages[0].content }}".into())),
            ],
        );
        let read = Checkpoint::open(&path).unwrap();
        assert_eq!(Architecture { pad: None, ..model.architecture.clone() }, read.architecture);
        for (name, tensor) in &model.parameters {
            let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(&read.parameters[name]), flat(tensor), "{name}");
        }
        assert_eq!(read.text.encode("ab ba").unwrap(), [27, 26, 1, 0]);
        assert_eq!(read.text.encode_chat(&[crate::Message::user("ab")]).unwrap(), [28, 27]);
        assert_eq!(read.text.decode(&[27, 26, 1, 29]).unwrap(), "ab b");
    }

    #[test]
    fn a_sentence_piece_tokenizer_merges_by_score() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let mut tokens: Vec<String> = ('a'..='x').map(String::from).collect();
        tokens.extend(["▁", "bc", "ab", "▁a", "<s>", "<unk>"].map(String::from));
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let scores = (0..30)
            .map(|i| {
                Value::F32(if i == 25 {
                    -1.0
                } else if i == 26 {
                    -2.0
                } else {
                    -3.0
                })
            })
            .collect();
        written(
            &path,
            vec![
                ("tokenizer.ggml.model", Value::String("llama".into())),
                ("tokenizer.ggml.tokens", strings(&tokens)),
                ("tokenizer.ggml.token_type", kinds(&[28])),
                ("tokenizer.ggml.scores", Value::Array(scores)),
            ],
        );
        let text = Checkpoint::open(&path).unwrap().text;
        // `bc` scores better than `ab` and `▁a`, so it merges first.
        assert_eq!(text.encode("abc").unwrap(), [28, 27, 25]);
        assert_eq!(text.decode(&[27, 25, 24, 25]).unwrap(), "abc bc");
    }

    #[test]
    fn numbers_out_of_range_are_no_panic() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let tokens: Vec<String> = (0..29).map(|i| format!("t{i}")).chain(["<unk>".to_string()]).collect();
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let tokenizer = |key: &'static str, value: u32| {
            vec![
                ("tokenizer.ggml.model", Value::String("llama".into())),
                ("tokenizer.ggml.tokens", strings(&tokens)),
                ("tokenizer.ggml.scores", Value::Array(vec![Value::F32(0.0); 30])),
                (key, Value::U32(value)),
            ]
        };
        written(&path, tokenizer("tokenizer.ggml.bos_token_id", 999));
        let text = Checkpoint::open(&path).unwrap().text;
        assert!(!text.encode("x").unwrap().contains(&999));
        for width in [0, 3] {
            written(&path, tokenizer("llama.attention.key_length", width));
            let error = Checkpoint::open(&path).err().expect("an error").to_string();
            assert!(error.contains("head_dim"), "{error}");
        }
    }

    #[test]
    fn an_unknown_kind_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.gguf");
        let letters = strings(&["a"; 30]);
        written(
            &path,
            vec![
                ("tokenizer.ggml.model", Value::String("gpt2".into())),
                ("tokenizer.ggml.pre", Value::String("novel".into())),
                ("tokenizer.ggml.tokens", letters),
                ("tokenizer.ggml.merges", strings(&[])),
            ],
        );
        let error = Checkpoint::open(&path).err().expect("an error").to_string();
        assert!(error.contains("`novel`"), "{error}");
    }
}
