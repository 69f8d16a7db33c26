use candle_core::DType;
use rehearsal_lm::generate::Sampling;

use super::Golden;

#[test]
fn golden_sampling_distributions() {
    for name in
        ["sampling_temp", "sampling_topk", "sampling_topp", "sampling_all", "sampling_minp", "sampling_topp_tiny"]
    {
        let golden = Golden::load(name);
        let param = |key: &str, off: f64| golden.value["params"][key].as_f64().unwrap_or(off);
        let sampling = Sampling {
            temperature: param("temperature", 1.0),
            top_k: param("top_k", 0.0) as usize,
            top_p: param("top_p", 1.0),
            min_p: param("min_p", 0.0),
        };
        let logits = golden.input("logits", DType::F32).to_vec2::<f32>().unwrap();
        let probs: Vec<f64> = logits.iter().flat_map(|row| sampling.distribution(row)).map(f64::from).collect();
        let kept: Vec<f64> = probs.iter().map(|&p| if p > 0.0 { 1.0 } else { 0.0 }).collect();
        golden.check_numbers("probs", &probs, true);
        golden.check_numbers("kept", &kept, true);
    }
}
