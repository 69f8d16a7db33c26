//! Our decoder against candle-transformers' llama, an implementation that shares nothing with it but candle.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};

#[test]
fn the_decoder_agrees_with_candle_transformers() {
    let model = rehearsal::embedded::model().unwrap();
    let ids = model.text.encode_chat(&[rehearsal::lm::Message::user("Tell me about the river.")]).unwrap();
    let ours = model.frozen(&Device::Cpu, DType::F32).unwrap().logits(&ids).unwrap().to_vec2::<f32>().unwrap();

    let config: LlamaConfig = serde_json::from_value(model.architecture.to_json()).unwrap();
    let config = config.into_config(false);
    let weights: HashMap<String, Tensor> = model.parameters.clone().into_iter().collect();
    let theirs = Llama::load(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu), &config).unwrap();
    for end in 1..=ids.len() {
        // It gives the logits after the last token only.
        let mut cache = Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        let input = Tensor::new(&ids[..end], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let logits = theirs.forward(&input, 0, &mut cache).unwrap().squeeze(0).unwrap().to_vec1::<f32>().unwrap();
        for (token, (a, b)) in ours[end - 1].iter().zip(&logits).enumerate() {
            assert!((a - b).abs() < 1e-4, "after {end} tokens, token {token}: {a} {b}");
        }
    }
}
