//! Converts the tokenizer of a GGUF file to a `tokenizer.json`.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::gguf::Metadata;
use crate::error::Result;

/// Token types of llama.cpp.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Contents of `tokenizer.json` and `tokenizer_config.json`.
pub fn tokenizer(metadata: &Metadata<'_>) -> Result<(String, Json)> {
    let strings = |key: &str| -> Result<Vec<String>> {
        let values = metadata.needed(key)?.to_vec().map_err(|e| metadata.malformed(format!("`{key}`: {e}")))?;
        values.iter().map(|v| v.to_string().cloned().map_err(|e| metadata.malformed(format!("`{key}`: {e}")))).collect()
    };
    let tokens = strings("tokenizer.ggml.tokens")?;
    let kinds: Vec<i64> = match metadata.get("tokenizer.ggml.token_type").map(|v| v.to_vec()) {
        Some(Ok(kinds)) => kinds.iter().map(|k| k.to_i64().or(k.to_i32().map(i64::from)).unwrap_or(1)).collect(),
        _ => vec![1; tokens.len()],
    };
    let added: Vec<Json> = (kinds.iter().enumerate())
        .filter(|(_, kind)| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, &kind)| {
            json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": kind == CONTROL})
        })
        .collect();
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().map(|(id, t)| (t.clone(), json!(id))).collect();
    let kind = metadata.text("tokenizer.ggml.model").unwrap_or_default();
    let mut tokenizer = match kind {
        "gpt2" => byte_level(metadata, strings("tokenizer.ggml.merges")?, vocab)?,
        "llama" => sentence_piece(metadata, &tokens, vocab)?,
        other => {
            return Err(
                metadata.malformed(format!("tokenizer model `{other}` is not supported; `gpt2` and `llama` are"))
            );
        }
    };
    tokenizer["version"] = json!("1.0");
    tokenizer["added_tokens"] = json!(added);
    let token = |name: &str| metadata.token(name).and_then(|id| tokens.get(id as usize));
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
        "bos_token": token("bos"), "eos_token": token("eos"),
        "unk_token": token("unknown"), "pad_token": token("padding"),
        "chat_template": metadata.text("tokenizer.chat_template"),
        "model_max_length": metadata.number("llama.context_length").map(|n| n as u64),
    });
    Ok((tokenizer.to_string(), config))
}

fn byte_level(metadata: &Metadata<'_>, merges: Vec<String>, vocab: serde_json::Map<String, Json>) -> Result<Json> {
    let level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, level(false)]})
    };
    let (mut ignore_merges, mut normalizer) = (false, Json::Null);
    let pre = metadata.text("tokenizer.ggml.pre").unwrap_or("default");
    let pre_tokenizer = match pre {
        "default" | "gpt-2" | "gpt2" => level(true),
        "smollm" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, level(true)]})
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            ignore_merges = true;
            split(concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ))
        }
        "qwen2" => {
            normalizer = json!({"type": "NFC"});
            split(concat!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ))
        }
        other => {
            return Err(metadata.malformed(format!(
                "pre-tokenizer `{other}` is not supported; use the model's Hugging Face directory"
            )));
        }
    };
    let merges: Vec<Json> =
        merges.iter().map(|m| m.split_once(' ').map_or(json!([m, ""]), |(a, b)| json!([a, b]))).collect();
    Ok(json!({
        "truncation": null, "padding": null, "normalizer": normalizer, "post_processor": null,
        "pre_tokenizer": pre_tokenizer, "decoder": level(true),
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges},
    }))
}

/// SentencePiece BPE: two pieces merge if the result is a piece, those with the highest score first.
fn sentence_piece(metadata: &Metadata<'_>, tokens: &[String], vocab: serde_json::Map<String, Json>) -> Result<Json> {
    let scores = metadata.needed("tokenizer.ggml.scores")?.to_vec().map_err(|e| metadata.malformed(e.to_string()))?;
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
    let score = |id: usize| scores.get(id).and_then(|s| s.to_f32().ok()).unwrap_or(f32::NEG_INFINITY);
    let mut merges: Vec<(f32, usize, &str, &str)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if ids.contains_key(a) && ids.contains_key(b) {
                merges.push((score(id), id, a, b));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)).then(ids[x.2].cmp(&ids[y.2])));
    let merges: Vec<Json> = merges.iter().map(|(_, _, a, b)| json!([a, b])).collect();
    let bos = metadata.token("bos").and_then(|id| Some((id, tokens.get(id as usize)?.clone())));
    let adds_bos = metadata.get("tokenizer.ggml.add_bos_token").and_then(|v| v.to_bool().ok()).unwrap_or(true);
    let post_processor = match bos.filter(|_| adds_bos) {
        Some((id, bos)) => json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos.clone(): {"id": bos, "ids": [id], "tokens": [bos]}}}),
        None => Json::Null,
    };
    Ok(json!({
        "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": post_processor,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    }))
}
