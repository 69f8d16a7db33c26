//! Trains the embedded model: a BPE tokenizer on the corpus, random weights, and a few minutes of supervised
//! fine-tuning.
//!
//! `rehearsal make-embedded --out runtime/embedded` runs it.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use rehearsal_learn::{
    AdamW, AdamWConfig, BatchTotals, NllReduction, Schedule, ScheduleKind, clip_scale, global_norm, sft,
};
use rehearsal_lm::random::Stream;
use rehearsal_lm::{Architecture, Batch, Checkpoint, Decoder, Gradients, Message, Parameters, Sequence, Text};
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::corpus::exchange;

const VOCAB: usize = 512;
const SPECIAL: [&str; 4] = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"];
const TEMPLATE: &str = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}\
                        {% if add_generation_prompt %}<|assistant|>{% endif %}";
/// Sequences of a batch.
const BATCH: u64 = 48;

/// Error of [`make`].
pub type MakeError = Box<dyn std::error::Error + Send + Sync>;

/// Trains for `steps` steps, calls `report` with each step and its loss, and writes the model's files to `out`.
pub fn make(out: &Path, steps: u64, report: &mut dyn FnMut(u64, f64)) -> Result<(), MakeError> {
    let text = tokenizer()?;
    let config = config();
    let architecture = Architecture::from_json(&config)?;
    let parameters = random_weights(&architecture)?;
    let checkpoint = Checkpoint { architecture, config, parameters, text };
    let decoder = checkpoint.trainable(&Device::Cpu, DType::F32)?;
    train(&decoder, &checkpoint.text, steps, report)?;
    checkpoint.save(&decoder.parameters(), out, DType::F16)?;
    // `embedded::model` does not use it.
    std::fs::remove_file(out.join("generation_config.json"))?;
    Ok(())
}

fn tokenizer() -> Result<Text, MakeError> {
    let added = |content: &str| AddedToken::from(content, true);
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(VOCAB)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.iter().map(|s| added(s)).collect())
        .build();
    let level = ByteLevel::new(false, true, true);
    let mut tokenizer = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(level))
        .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
        .with_decoder(Some(level))
        .build()?;
    let lines = (0..20_000).map(exchange).flat_map(|e| [e.question, e.answer]);
    tokenizer.train(&mut trainer, lines)?;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": false, "chat_template": TEMPLATE,
    });
    Ok(Text::from_json(tokenizer.to_string(false)?.as_bytes(), Some(config.to_string().as_bytes()), None)?)
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": VOCAB,
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false,
        "bos_token_id": null, "eos_token_id": 3, "pad_token_id": 0, "torch_dtype": "float16",
    })
}

fn random_weights(architecture: &Architecture) -> Result<Parameters, MakeError> {
    let mut parameters = Parameters::new();
    for (i, (name, shape)) in architecture.parameters().into_iter().enumerate() {
        let stream = Stream::new(7, i as u64);
        let n = shape.iter().product::<usize>() as u64;
        let norm = shape.len() == 1;
        let data: Vec<f32> = (0..n).map(|j| if norm { 1.0 } else { 0.05 * stream.normal(j) as f32 }).collect();
        parameters.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
    }
    Ok(parameters)
}

fn train(decoder: &Decoder, text: &Text, steps: u64, report: &mut dyn FnMut(u64, f64)) -> Result<(), MakeError> {
    let adamw = AdamWConfig { beta2: 0.98, weight_decay: 0.01, ..AdamWConfig::default() };
    let mut optimizer = AdamW::new(decoder.variables(), adamw)?;
    let kind = ScheduleKind::Cosine { floor: 0.02 };
    let schedule = Schedule { kind, peak: 4e-3, warmup_steps: steps / 20, total_steps: steps };
    let end = text.encode_plain("<|end|>")?;
    for step in 0..steps {
        let mut sequences = Vec::new();
        for index in 0..BATCH {
            let e = exchange(1_000_000 + step * BATCH + index);
            let prompt = text.encode_chat(&[Message::user(e.question)])?;
            let completion = [text.encode_plain(&e.answer)?, end.clone()].concat();
            sequences.push((prompt, completion));
        }
        let batch = Batch::new(sequences.iter().map(|(prompt, completion)| Sequence { prompt, completion }));
        let forward = decoder.forward(&batch, 1.0)?;
        let logprobs = Var::from_tensor(&forward.output())?;
        let whole = BatchTotals { sequences: sequences.len(), tokens: batch.scored() };
        let loss = sft::nll(&logprobs, batch.spans(), NllReduction::TokenMean, whole)?;
        let grad = loss.backward()?.remove(&logprobs).ok_or("the loss has no gradient")?;
        let mut gradients = Gradients::default();
        forward.backward(&grad, &mut gradients)?;
        let gradients: BTreeMap<String, Tensor> = gradients.complete(decoder)?;
        let scale = clip_scale(global_norm(&gradients)?, Some(1.0));
        optimizer.step(decoder.variables(), &gradients, schedule.rate(step), scale)?;
        report(step, f64::from(loss.to_scalar::<f32>()?));
    }
    Ok(())
}
