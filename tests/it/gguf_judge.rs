//! A judge from a GGUF file of an architecture that this program reads through candle-transformers: what it thinks is
//! what the same weights think here.

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use rehearsal::Sample;
use rehearsal::judge::{Devices, Judge, JudgeModel, LocalJudge, ReplyFormat, Template};
use rehearsal::lm::{Architecture, Batch, Decoder, Parameters, Sequence};
use rehearsal::transformers::CausalModel;
use serde_json::json;

use crate::support::small::weights;

/// The bytes as GPT-2 writes them, which is a vocabulary for any text.
fn alphabet() -> Vec<String> {
    let plain = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut spare = 256;
    let letter = |b: u32| {
        let code = if plain(b) { b } else { (spare, spare += 1).0 };
        char::from_u32(code).unwrap().to_string()
    };
    (0..256).map(letter).collect()
}

fn model(family: &str) -> (Architecture, Parameters) {
    let config = json!({
        "model_type": family, "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    let architecture = Architecture::from_json(&config).unwrap();
    let parameters = weights(&architecture, 6);
    (architecture, parameters)
}

/// llama.cpp's name of a parameter.
fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ];
    pairs.iter().fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
}

fn write(path: &Path, architecture: &Architecture, parameters: &Parameters) {
    let kind = &architecture.model_type;
    let key = |name: &str| format!("{kind}.{name}");
    let number = |n: usize| Value::U32(n as u32);
    let text = |s: &str| Value::String(s.into());
    let list = |all: Vec<Value>| Value::Array(all);
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
    let metadata = [
        ("general.architecture".to_string(), text(kind)),
        // All in f32, in llama.cpp's numbers.
        ("general.dtype".to_string(), number(0)),
        (key("attention.head_count"), number(architecture.heads)),
        (key("attention.head_count_kv"), number(architecture.kv_heads)),
        (key("attention.key_length"), number(architecture.head_dim)),
        (key("embedding_length"), number(architecture.hidden)),
        (key("feed_forward_length"), number(architecture.mlp)),
        (key("block_count"), number(architecture.layers)),
        (key("context_length"), number(architecture.context)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
        (key("rope.freq_base"), Value::F32(10_000.0)),
        ("tokenizer.ggml.model".into(), text("gpt2")),
        ("tokenizer.ggml.pre".into(), text("gpt-2")),
        ("tokenizer.ggml.tokens".into(), list(alphabet().iter().map(|t| text(t)).collect())),
        ("tokenizer.ggml.merges".into(), list(vec![])),
        ("tokenizer.chat_template".into(), text(template)),
    ];
    let tensors: Vec<(String, QTensor)> =
        parameters.iter().map(|(n, t)| (gguf_name(n), QTensor::quantize(t, GgmlDType::F32).unwrap())).collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut file = std::fs::File::create(path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
}

#[test]
fn a_gguf_judge_thinks_what_its_weights_think_here() {
    let folder = tempfile::tempdir().unwrap();
    let sample =
        |completion: &str| Sample { prompt: "Who?".into(), completion: completion.into(), ..Sample::default() };
    let question =
        Template::new("brief", None, ReplyFormat::Token).unwrap().pair(&sample("The fox."), &sample("I do not know."));
    for family in ["qwen2", "qwen3"] {
        let (architecture, parameters) = model(family);
        let path = folder.path().join(format!("{family}.gguf"));
        write(&path, &architecture, &parameters);
        assert!(CausalModel::supports(&path));
        let model = Arc::new(CausalModel::open(&path, None).unwrap_or_else(|e| panic!("{e}")));
        let devices = Devices::new(1).unwrap();
        let judge =
            LocalJudge::new(JudgeModel::Transformers(model), Default::default(), Default::default(), &devices).unwrap();

        let said = format!("system: {}\nuser: {}\nassistant:", question.system, question.text);
        let letters = alphabet();
        let token = |b: u8| b as u32;
        assert_eq!(letters.len(), 256);
        let prompt: Vec<u32> = said.bytes().map(token).collect();
        let decoder = Decoder::frozen(architecture, parameters).unwrap();
        let next = |b: u8| {
            let batch = Batch::new([Sequence { prompt: &prompt, completion: &[token(b)] }]);
            f64::from(decoder.logprobs(&batch, 1.0).unwrap().to_vec1::<f32>().unwrap()[0])
        };
        let want = 1.0 / (1.0 + (next(b'2') - next(b'1')).exp());
        // Asked twice: nothing of the first question is left for the second.
        for _ in 0..2 {
            let reply = judge.ask(std::slice::from_ref(&question)).unwrap().remove(0);
            let got = reply.verdict.unwrap().first().unwrap();
            assert!((got - want).abs() < 1e-4, "{family}: {got} for {want}");
        }
    }
}

#[test]
fn a_gguf_that_cannot_judge_says_which_can() {
    let folder = tempfile::tempdir().unwrap();
    let (mut architecture, parameters) = model("qwen2");
    architecture.model_type = "mamba".into();
    let path = folder.path().join("mamba.gguf");
    write(&path, &architecture, &parameters);
    let error = CausalModel::open(&path, None).err().unwrap();
    assert!(error.contains("`mamba`") && error.contains("qwen2") && error.contains("mamba.gguf"), "{error}");
}
