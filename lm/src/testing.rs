//! A tiny model for this crate's tests.

use candle_core::{Device, Tensor};
use rehearsal_kernels::random::Stream;
use serde_json::json;

use crate::load::Checkpoint;
use crate::model::{Architecture, Parameters};
use crate::text::Text;

/// Random weights over a vocabulary of the letters a to z, the space and three special tokens.
pub fn checkpoint() -> Checkpoint {
    let config = json!({
        "model_type": "llama", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "attention_bias": true,
        "bos_token_id": 28, "eos_token_id": 29, "torch_dtype": "float32",
    });
    let architecture = Architecture::from_json(&config).unwrap();
    let parameters: Parameters = architecture
        .parameters()
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let stream = Stream::new(5, i as u64);
            let n: usize = shape.iter().product();
            let center = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
            let data: Vec<f32> = (0..n as u64).map(|j| center + 0.3 * stream.normal(j) as f32).collect();
            (name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap())
        })
        .collect();
    let mut vocab: serde_json::Map<String, serde_json::Value> =
        ('a'..='z').enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    vocab.insert(" ".into(), json!(26));
    vocab.insert("<unk>".into(), json!(27));
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": {"type": "Fuse"}, "added_tokens": [special(28, "<s>"), special(29, "</s>")],
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    let text = Text::from_json(tokenizer.to_string().as_bytes(), None, None).unwrap();
    Checkpoint { architecture, config, parameters, text }
}
