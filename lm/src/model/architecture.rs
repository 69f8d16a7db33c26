//! What a decoder is made of, read from Hugging Face's `config.json` (transformers 4 and 5).

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::kernels::attention::Heads;

/// One decoder, described by its features.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: String,
    pub vocab: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub norm_eps: f64,
    pub rope: Rope,
    /// Positions the model was made for.
    pub context: usize,
    /// The head is the embedding.
    pub tied: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
    /// Keys a query sees at most (Mistral).
    pub window: Option<usize>,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
}

/// Rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Scaling,
}

/// How frequencies are stretched for a longer context.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    None,
    /// Every frequency divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original_context: f64,
    },
}

impl Rope {
    /// `theta^(-2i/d)` for each pair of a head, scaled, in f32 as `transformers` has them.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let base = |i: usize| 1.0 / self.theta.powf(2.0 * i as f64 / head_dim as f64);
        let scaled = |f: f64| match self.scaling {
            Scaling::None => f,
            Scaling::Linear { factor } => f / factor,
            Scaling::Llama3 { factor, low, high, original_context } => {
                let wavelength = std::f64::consts::TAU / f;
                if wavelength < original_context / high {
                    f
                } else if wavelength > original_context / low {
                    f / factor
                } else {
                    let ramp = (original_context / wavelength - low) / (high - low);
                    (1.0 - ramp) * f / factor + ramp * f
                }
            }
        };
        (0..head_dim / 2).map(|i| scaled(base(i)) as f32).collect()
    }
}

/// Reads keys of a JSON object and says which one is wrong.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n > 0 => Ok(Some(n as usize)),
            _ => Err(Error::Config(format!("`{key}` = {value} must be a positive whole number"))),
        }
    }

    fn needed(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| Error::Config(format!("`{key}` is missing")))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| Error::Config(format!("`{key}` = {value} must be a number")))
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    fn tokens(&self, key: &str) -> Vec<u32> {
        let one = |v: &Value| v.as_u64().map(|n| n as u32);
        match self.get(key) {
            Some(Value::Array(many)) => many.iter().filter_map(one).collect(),
            Some(value) => one(value).into_iter().collect(),
            None => Vec::new(),
        }
    }
}

impl Architecture {
    /// Reads a `config.json`.
    pub fn from_json(config: &Value) -> Result<Self> {
        let map = config.as_object().ok_or_else(|| Error::Config("config.json is not an object".into()))?;
        let keys = Keys(map);
        let model_type = keys.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
        if !matches!(model_type.as_str(), "llama" | "mistral") {
            return Err(Error::Config(format!(
                "model_type `{model_type}` is not supported; `llama` and `mistral` are"
            )));
        }
        if let Some(act) = keys.get("hidden_act").and_then(Value::as_str).filter(|&a| a != "silu") {
            return Err(Error::Config(format!(
                "hidden_act `{act}` is not supported by a `{model_type}` model; `silu` is"
            )));
        }
        let (hidden, heads) = (keys.needed("hidden_size")?, keys.needed("num_attention_heads")?);
        let kv_heads = keys.size("num_key_value_heads")?.unwrap_or(heads);
        let head_dim = match keys.size("head_dim")? {
            Some(d) => d,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                return Err(Error::Config(format!("num_attention_heads {heads} does not divide hidden_size {hidden}")));
            }
        };
        if heads % kv_heads != 0 {
            return Err(Error::Config(format!(
                "num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"
            )));
        }
        if head_dim % 2 != 0 {
            return Err(Error::Config(format!("head_dim {head_dim} is odd; rotary positions need pairs")));
        }
        let context = keys.size("max_position_embeddings")?.unwrap_or(2048);
        Ok(Self {
            vocab: keys.needed("vocab_size")?,
            hidden,
            layers: keys.needed("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            mlp: keys.needed("intermediate_size")?,
            norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: rope(&keys, context)?,
            context,
            tied: keys.flag("tie_word_embeddings", false),
            attention_bias: keys.flag("attention_bias", false),
            mlp_bias: keys.flag("mlp_bias", false),
            window: if model_type == "mistral" { keys.size("sliding_window")? } else { None },
            bos: keys.tokens("bos_token_id").first().copied(),
            eos: keys.tokens("eos_token_id"),
            pad: keys.tokens("pad_token_id").first().copied(),
            model_type,
        })
    }

    /// A `config.json` that `transformers` reads.
    pub fn to_json(&self) -> Value {
        let class = if self.model_type == "mistral" { "MistralForCausalLM" } else { "LlamaForCausalLM" };
        let scaling = match self.rope.scaling {
            Scaling::None => Value::Null,
            Scaling::Linear { factor } => json!({"rope_type": "linear", "type": "linear", "factor": factor}),
            Scaling::Llama3 { factor, low, high, original_context } => json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original_context as u64,
            }),
        };
        let eos = if self.eos.len() == 1 { json!(self.eos[0]) } else { json!(self.eos) };
        json!({
            "architectures": [class], "model_type": self.model_type, "hidden_act": "silu",
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": self.context, "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope.theta, "rope_scaling": scaling, "sliding_window": self.window,
            "tie_word_embeddings": self.tied, "attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos, "eos_token_id": if self.eos.is_empty() { Value::Null } else { eos },
            "pad_token_id": self.pad, "torch_dtype": "float32",
        })
    }

    /// Heads, scale and window of every layer.
    pub fn attention(&self) -> Heads {
        Heads {
            queries: self.heads,
            keys: self.kv_heads,
            dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            softcap: None,
        }
    }

    /// Every parameter by its Hugging Face name, with its shape, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (h, q, kv) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut all = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab, h])];
        for i in 0..self.layers {
            let mut linear = |part: &str, out: usize, inp: usize, bias: bool| {
                all.push((format!("model.layers.{i}.{part}.weight"), vec![out, inp]));
                if bias {
                    all.push((format!("model.layers.{i}.{part}.bias"), vec![out]));
                }
            };
            linear("self_attn.q_proj", q, h, self.attention_bias);
            linear("self_attn.k_proj", kv, h, self.attention_bias);
            linear("self_attn.v_proj", kv, h, self.attention_bias);
            linear("self_attn.o_proj", h, q, self.attention_bias);
            linear("mlp.gate_proj", self.mlp, h, self.mlp_bias);
            linear("mlp.up_proj", self.mlp, h, self.mlp_bias);
            linear("mlp.down_proj", h, self.mlp, self.mlp_bias);
            all.push((format!("model.layers.{i}.input_layernorm.weight"), vec![h]));
            all.push((format!("model.layers.{i}.post_attention_layernorm.weight"), vec![h]));
        }
        all.push(("model.norm.weight".to_string(), vec![h]));
        if !self.tied {
            all.push(("lm_head.weight".to_string(), vec![self.vocab, h]));
        }
        all
    }
}

/// Rotary settings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4).
fn rope(keys: &Keys<'_>, context: usize) -> Result<Rope> {
    let empty = Map::new();
    let object = |key: &str| keys.get(key).and_then(Value::as_object);
    let settings = Keys(object("rope_parameters").or(object("rope_scaling")).unwrap_or(&empty));
    let theta = settings.number("rope_theta")?.or(keys.number("rope_theta")?).unwrap_or(10_000.0);
    let kind = settings.get("rope_type").or(settings.get("type")).and_then(Value::as_str).unwrap_or("default");
    let needed =
        |key: &str| settings.number(key)?.ok_or_else(|| Error::Config(format!("rope type `{kind}` needs `{key}`")));
    let scaling = match kind {
        "default" => Scaling::None,
        "linear" => Scaling::Linear { factor: needed("factor")? },
        "llama3" => Scaling::Llama3 {
            factor: needed("factor")?,
            low: needed("low_freq_factor")?,
            high: needed("high_freq_factor")?,
            original_context: settings.number("original_max_position_embeddings")?.unwrap_or(context as f64),
        },
        other => {
            return Err(Error::Config(format!(
                "rope type `{other}` is not supported; `default`, `linear` and `llama3` are"
            )));
        }
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(extra: Value) -> Value {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 10, "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "intermediate_size": 8,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    }

    #[test]
    fn both_generations_of_rope_settings_are_read() {
        let four = Architecture::from_json(&config(json!({"rope_theta": 5e5, "rope_scaling": null}))).unwrap();
        let five =
            Architecture::from_json(&config(json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})));
        assert_eq!(four, five.unwrap());
    }

    #[test]
    fn a_written_config_reads_back() {
        let scaled = config(json!({"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}, "eos_token_id": [1, 2]}));
        let arch = Architecture::from_json(&scaled).unwrap();
        assert_eq!(Architecture::from_json(&arch.to_json()).unwrap(), arch);
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let plain = Rope { theta: 5e5, scaling: Scaling::None }.inverse_frequencies(128);
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original_context: 8192.0 };
        let scaled = Rope { theta: 5e5, scaling }.inverse_frequencies(128);
        assert_eq!(plain[0], scaled[0]);
        assert!((plain[63] / scaled[63] - 8.0).abs() < 1e-5);
    }

    #[test]
    fn a_wrong_value_is_named() {
        let error = Architecture::from_json(&config(json!({"num_key_value_heads": 3}))).unwrap_err().to_string();
        assert!(error.contains("num_key_value_heads 3"), "{error}");
        let error = Architecture::from_json(&config(json!({"vocab_size": -1}))).unwrap_err().to_string();
        assert!(error.contains("vocab_size"), "{error}");
        let error =
            Architecture::from_json(&config(json!({"rope_scaling": {"rope_type": "yarn"}}))).unwrap_err().to_string();
        assert!(error.contains("yarn"), "{error}");
    }
}
