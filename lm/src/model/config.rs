//! Reads and writes Hugging Face's `config.json` (transformers 4 and 5).

use rehearsal_kernels::activation::Activation;
use serde_json::{Map, Value, json};

use super::architecture::{Architecture, HeadKind, NormKind, Position, Rope, Scaling};
use crate::error::{Error, Result};

/// Supported values of `model_type`.
const MODEL_TYPES: [&str; 7] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2"];

/// Largest size that a config may name: far more than any model has, and little enough for what is sized by it.
const SIZE_MAX: u64 = 1 << 24;
/// Most layers.
const LAYERS_MAX: usize = 4096;

/// Typed access to a JSON object; errors name the key.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n > SIZE_MAX => Err(Error::Config(format!(
                "`{key}` = {value} is larger than this program takes; {SIZE_MAX} is the most"
            ))),
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
    /// Parses a `config.json`. Errors name the key and its value.
    pub fn from_json(config: &Value) -> Result<Self> {
        let map = config.as_object().ok_or_else(|| Error::Config("config.json is not an object".into()))?;
        let keys = Keys(map);
        let model_type = keys.get("model_type").and_then(Value::as_str).unwrap_or_default();
        if !MODEL_TYPES.contains(&model_type) {
            let supported = MODEL_TYPES.map(|f| format!("`{f}`")).join(", ");
            return Err(Error::Config(format!("model_type `{model_type}` is not supported; {supported} are")));
        }
        let arch = if model_type == "gpt2" { gpt2(&keys)? } else { llama_like(&keys, model_type)? };
        if arch.layers > LAYERS_MAX {
            let layers = arch.layers;
            return Err(Error::Config(format!("the model claims to have {layers} layers; {LAYERS_MAX} are the most")));
        }
        if arch.heads % arch.kv_heads != 0 {
            return Err(Error::Config(format!(
                "num_key_value_heads {} does not divide num_attention_heads {}",
                arch.kv_heads, arch.heads
            )));
        }
        if arch.head_dim % 2 != 0 && arch.position != Position::Learned {
            return Err(Error::Config(format!(
                "head_dim {} is odd; rotary position embeddings need an even one",
                arch.head_dim
            )));
        }
        let arch = match head(&keys)? {
            HeadKind::Language => arch,
            HeadKind::Score => arch.with_head(HeadKind::Score),
        };
        Ok(Self {
            bos: keys.tokens("bos_token_id").first().copied(),
            eos: keys.tokens("eos_token_id"),
            pad: keys.tokens("pad_token_id").first().copied(),
            model_type: model_type.into(),
            ..arch
        })
    }

    /// The `config.json` of a Llama or Mistral, as `transformers` reads it.
    pub fn to_json(&self) -> Value {
        let class = if self.model_type == "mistral" { "MistralForCausalLM" } else { "LlamaForCausalLM" };
        let plain = Rope { theta: 10_000.0, scaling: Scaling::None };
        let rope = if let Position::Rotary { rope, .. } = &self.position { rope } else { &plain };
        let scaling = match rope.scaling {
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
            "rope_theta": rope.theta, "rope_scaling": scaling, "sliding_window": self.window,
            "tie_word_embeddings": self.tied, "attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos, "eos_token_id": if self.eos.is_empty() { Value::Null } else { eos },
            "pad_token_id": self.pad, "torch_dtype": "float32",
        })
    }
}

/// `config` with its class and labels changed to those of another head, as `transformers` expects them.
pub(crate) fn with_head(config: &Value, head: HeadKind) -> Value {
    let mut config = config.clone();
    let Some(map) = config.as_object_mut() else { return config };
    let class = map.get("architectures").and_then(|a| a[0].as_str()).unwrap_or("LlamaForCausalLM").to_string();
    let stem = class.trim_end_matches("ForCausalLM").trim_end_matches("LMHeadModel");
    let stem = stem.trim_end_matches("ForSequenceClassification").to_string();
    match head {
        HeadKind::Score => {
            map.insert("architectures".into(), json!([format!("{stem}ForSequenceClassification")]));
            map.insert("num_labels".into(), json!(1));
            map.insert("id2label".into(), json!({"0": "LABEL_0"}));
            map.insert("label2id".into(), json!({"LABEL_0": 0}));
        }
        HeadKind::Language => {
            let ending = if stem == "GPT2" { "LMHeadModel" } else { "ForCausalLM" };
            map.insert("architectures".into(), json!([format!("{stem}{ending}")]));
            for key in ["num_labels", "id2label", "label2id"] {
                map.remove(key);
            }
        }
    }
    config
}

fn head(keys: &Keys<'_>) -> Result<HeadKind> {
    let class = keys.get("architectures").and_then(|a| a[0].as_str()).unwrap_or_default();
    if !class.ends_with("ForSequenceClassification") {
        return Ok(HeadKind::Language);
    }
    let labels = keys.size("num_labels")?.or(keys.get("id2label").and_then(Value::as_object).map(Map::len));
    match labels {
        // transformers omits the default, two labels.
        Some(1) => Ok(HeadKind::Score),
        n => {
            Err(Error::Config(format!("num_labels = {} is not supported: a score head has one label", n.unwrap_or(2))))
        }
    }
}

fn llama_like(keys: &Keys<'_>, family: &str) -> Result<Architecture> {
    let gemma = family.starts_with("gemma");
    let (hidden, heads) = (keys.needed("hidden_size")?, keys.needed("num_attention_heads")?);
    let kv_heads = keys.size("num_key_value_heads")?.unwrap_or(heads);
    let layers = keys.needed("num_hidden_layers")?;
    let head_dim = match keys.size("head_dim")? {
        Some(d) => d,
        None if family == "gemma2" || family == "gemma3_text" => 256,
        None if family == "qwen3" => 128,
        None if hidden % heads == 0 => hidden / heads,
        None => {
            return Err(Error::Config(format!("num_attention_heads {heads} does not divide hidden_size {hidden}")));
        }
    };
    let act = keys.get("hidden_activation").or(keys.get("hidden_act")).and_then(Value::as_str);
    let wanted: &[&str] = if gemma { &["gelu_pytorch_tanh"] } else { &["silu"] };
    if let Some(act) = act.filter(|a| !wanted.contains(a)) {
        return Err(Error::Config(format!(
            "hidden_act `{act}` is not supported by a `{family}` model; `{}` is",
            wanted[0]
        )));
    }
    let context = keys.size("max_position_embeddings")?.unwrap_or(2048);
    let bias = keys.flag("attention_bias", false);
    let (window, sliding) = sliding(keys, family, layers)?;
    Ok(Architecture {
        vocab: keys.needed("vocab_size")?,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        mlp: keys.needed("intermediate_size")?,
        norm: if gemma { NormKind::RmsPlusOne } else { NormKind::Rms },
        norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
        activation: if gemma { Activation::GeluTanh } else { Activation::Silu },
        position: rotary(keys, context, family)?,
        context,
        tied: keys.flag("tie_word_embeddings", gemma),
        qkv_bias: bias || family == "qwen2",
        output_bias: bias && family != "qwen2",
        mlp_bias: keys.flag("mlp_bias", false),
        qk_norm: matches!(family, "qwen3" | "gemma3_text"),
        sandwich: gemma,
        scaled_embedding: gemma,
        query_scalar: if gemma { Some(keys.number("query_pre_attn_scalar")?.unwrap_or(256.0)) } else { None },
        attention_softcap: keys.number("attn_logit_softcapping")?,
        final_softcap: keys.number("final_logit_softcapping")?,
        window,
        sliding,
        ..Architecture::default()
    })
}

/// The sliding window, and which layers have it.
fn sliding(keys: &Keys<'_>, family: &str, layers: usize) -> Result<(Option<usize>, Vec<bool>)> {
    let window = match family {
        "mistral" | "gemma2" | "gemma3_text" => keys.size("sliding_window")?,
        "qwen2" | "qwen3" if keys.flag("use_sliding_window", false) => keys.size("sliding_window")?,
        _ => None,
    };
    if window.is_none() {
        return Ok((None, Vec::new()));
    }
    if let Some(kinds) = keys.get("layer_types").and_then(Value::as_array) {
        if kinds.len() != layers {
            let n = kinds.len();
            return Err(Error::Config(format!("layer_types has {n} entries, but num_hidden_layers is {layers}")));
        }
        return Ok((window, kinds.iter().map(|k| k == "sliding_attention").collect()));
    }
    // The defaults of transformers for configs older than `layer_types`.
    let pattern = match family {
        "gemma2" => 2,
        "gemma3_text" => keys.size("sliding_window_pattern")?.unwrap_or(6),
        "qwen2" | "qwen3" => {
            let from = keys.size("max_window_layers")?.unwrap_or(28);
            return Ok((window, (0..layers).map(|layer| layer >= from).collect()));
        }
        _ => return Ok((window, Vec::new())),
    };
    Ok((window, (0..layers).map(|layer| (layer + 1) % pattern != 0).collect()))
}

fn rotary(keys: &Keys<'_>, context: usize, family: &str) -> Result<Position> {
    if family != "gemma3_text" {
        return Ok(Position::Rotary { rope: rope(keys, context)?, sliding: None });
    }
    // Two sets of frequencies: by type of layer (transformers 5), or under separate keys (4).
    let by_type = keys.get("rope_parameters").and_then(Value::as_object);
    let named = |kind: &str| by_type.and_then(|p| p.get(kind)).and_then(Value::as_object);
    let (rope, local) = match (named("full_attention"), named("sliding_attention")) {
        (Some(full), Some(local)) => {
            let read = |map: &Map<String, Value>| {
                rope(&Keys(&Map::from_iter([("rope_parameters".into(), json!(map))])), context)
            };
            (read(full)?, read(local)?)
        }
        _ => {
            let full = Rope { theta: keys.number("rope_theta")?.unwrap_or(1e6), ..rope(keys, context)? };
            let theta = keys.number("rope_local_base_freq")?.unwrap_or(10_000.0);
            (full, Rope { theta, scaling: Scaling::None })
        }
    };
    Ok(Position::Rotary { rope, sliding: Some(local) })
}

fn gpt2(keys: &Keys<'_>) -> Result<Architecture> {
    let (hidden, heads) = (keys.needed("n_embd")?, keys.needed("n_head")?);
    if hidden % heads != 0 {
        return Err(Error::Config(format!("n_head {heads} does not divide n_embd {hidden}")));
    }
    if let Some(act) = keys.get("activation_function").and_then(Value::as_str).filter(|&a| a != "gelu_new") {
        return Err(Error::Config(format!(
            "activation_function `{act}` is not supported by a `gpt2` model; `gelu_new` is"
        )));
    }
    for key in ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"] {
        if keys.flag(key, false) {
            return Err(Error::Config(format!("`{key}` is not supported")));
        }
    }
    if !keys.flag("scale_attn_weights", true) {
        return Err(Error::Config("`scale_attn_weights` = false is not supported".into()));
    }
    Ok(Architecture {
        vocab: keys.needed("vocab_size")?,
        hidden,
        layers: keys.needed("n_layer")?,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        mlp: keys.size("n_inner")?.unwrap_or(4 * hidden),
        norm: NormKind::Layer,
        norm_eps: keys.number("layer_norm_epsilon")?.unwrap_or(1e-5),
        activation: Activation::GeluTanh,
        gated: false,
        position: Position::Learned,
        context: keys.size("n_positions")?.unwrap_or(1024),
        tied: keys.flag("tie_word_embeddings", true),
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        ..Architecture::default()
    })
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
    fn a_size_that_no_model_has_is_refused_before_anything_is_sized_by_it() {
        for (key, value) in [
            ("max_position_embeddings", 100_000_000_000u64),
            ("vocab_size", u64::MAX),
            ("hidden_size", 1 << 40),
            ("num_hidden_layers", 1_000_000),
        ] {
            let error = Architecture::from_json(&config(json!({ key: value }))).err().unwrap().to_string();
            assert!(error.contains(key) || error.contains("layers"), "{error}");
        }
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
