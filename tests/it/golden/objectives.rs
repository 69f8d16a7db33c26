use candle_core::{DType, Tensor, Var};
use rehearsal_learn::pairs::penalise_missing_eos;
use rehearsal_learn::{
    AdaptiveKl, BatchTotals, KlEstimator, NllReduction, TieRule, ema, kl, masked, select_pairs, sft, token,
};

use super::{Golden, TYPES, flat, numbers, rows, tensor};

#[test]
fn golden_gather_logprobs() {
    for name in ["logprobs", "logprobs_temperature", "logprobs_extreme"] {
        let golden = Golden::load(name);
        for dtype in TYPES {
            // f32 cannot hold the extreme inputs' differences; the file's f32 tolerance allows for it.
            let logits = Var::from_tensor(&golden.input("logits", dtype)).unwrap();
            let labels = golden.input("labels", DType::U32);
            let logprobs = token::gather_logprobs(&logits, &labels, golden.param("temperature")).unwrap();
            golden.check("logprobs", &logprobs);
            let loss = (&logprobs * golden.input("grad_out", dtype)).unwrap().sum_all().unwrap();
            golden.check("grad_logits", loss.backward().unwrap().get(&logits).unwrap());
        }
    }
}

#[test]
fn golden_masked_statistics() {
    let golden = Golden::load("masked_stats");
    let eps = golden.param("eps");
    for dtype in TYPES {
        let (x, m) = (golden.input("values", dtype), golden.input("mask", dtype));
        golden.check("mean", &masked::mean(&x, &m).unwrap());
        golden.check("row_mean", &masked::row_mean(&x, &m).unwrap());
        golden.check("var_unbiased", &masked::variance(&x, &m, true).unwrap());
        golden.check("var_biased", &masked::variance(&x, &m, false).unwrap());
        golden.check("whitened_unbiased_shift", &masked::whiten(&x, &m, true, true, eps).unwrap());
        golden.check("whitened_unbiased_noshift", &masked::whiten(&x, &m, true, false, eps).unwrap());
        golden.check("whitened_biased_shift", &masked::whiten(&x, &m, false, true, eps).unwrap());
    }
}

#[test]
fn golden_entropy() {
    let golden = Golden::load("entropy");
    for dtype in TYPES {
        let logits = Var::from_tensor(&golden.input("logits", dtype)).unwrap();
        let entropy = token::entropy(&logits).unwrap();
        golden.check("entropy", &entropy);
        let loss = (&entropy * golden.input("grad_out", dtype)).unwrap().sum_all().unwrap();
        golden.check("grad_logits", loss.backward().unwrap().get(&logits).unwrap());
    }
}

#[test]
fn golden_sft_nll() {
    for (name, reduction) in
        [("sft_nll_token_mean", NllReduction::TokenMean), ("sft_nll_seq_mean", NllReduction::SequenceMean)]
    {
        let golden = Golden::load(name);
        for dtype in TYPES {
            let logits = Var::from_tensor(&golden.input("logits", dtype)).unwrap();
            let (_, length, vocab) = logits.dims3().unwrap();
            let labels = flat(&golden.input("labels", DType::F64));
            // Logits at t predict the label at t + 1; -100 is not learned from.
            let (mut places, mut targets, mut spans) = (Vec::new(), Vec::new(), vec![0]);
            for (row, labels) in labels.chunks(length).enumerate() {
                for (t, &label) in labels.iter().enumerate().skip(1).filter(|(_, l)| **l >= 0.0) {
                    places.push((row * length + t - 1) as u32);
                    targets.push(label as u32);
                }
                spans.push(places.len());
            }
            golden.check_numbers("num_tokens", &[places.len() as f64], false);
            let whole = BatchTotals { sequences: spans.len() - 1, tokens: places.len() };
            let index = Tensor::new(places, logits.device()).unwrap();
            let rows = logits.reshape(((), vocab)).unwrap().index_select(&index, 0).unwrap();
            let logprobs = token::gather_logprobs(&rows, &Tensor::new(targets, logits.device()).unwrap(), 1.0).unwrap();
            let loss = sft::nll(&logprobs, &spans, reduction, whole).unwrap();
            golden.check("loss", &loss);
            golden.check("grad_logits", loss.backward().unwrap().get(&logits).unwrap());
        }
    }
}

#[test]
fn golden_kl() {
    let golden = Golden::load("kl_estimators");
    for dtype in TYPES {
        let (mask, reference) = (golden.input("mask", dtype), golden.input("ref_logprobs", dtype));
        for (name, estimator) in
            [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3), ("abs", KlEstimator::Abs)]
        {
            let logprobs = Var::from_tensor(&golden.input("logprobs", dtype)).unwrap();
            let kl = estimator.tensor(&logprobs, &reference).unwrap();
            golden.check(name, &kl);
            let scalars: Vec<f64> =
                flat(&logprobs).iter().zip(flat(&reference)).map(|(&p, r)| estimator.of(p, r)).collect();
            golden.check_numbers(name, &scalars, dtype == DType::F32);
            let mean = masked::mean(&kl, &mask).unwrap();
            golden.check(&format!("masked_mean_{name}"), &mean);
            golden.check(&format!("grad_masked_mean_{name}"), mean.backward().unwrap().get(&logprobs).unwrap());
        }
    }
    let golden = Golden::load("kl_full");
    for dtype in TYPES {
        let logits = Var::from_tensor(&golden.input("logits", dtype)).unwrap();
        let kl = kl::full(&logits, &golden.input("ref_logits", dtype)).unwrap();
        golden.check("kl", &kl);
        let mean = masked::mean(&kl, &golden.input("mask", dtype)).unwrap();
        golden.check("masked_mean", &mean);
        golden.check("grad_masked_mean", mean.backward().unwrap().get(&logits).unwrap());
    }
}

#[test]
fn golden_adaptive_kl() {
    let golden = Golden::load("adaptive_kl");
    let controller =
        AdaptiveKl { target: golden.param("target"), horizon: golden.param("horizon"), clip: golden.param("clip") };
    let mut coefficient = golden.param("init");
    let after: Vec<f64> = flat(&golden.input("current_kl", DType::F64))
        .into_iter()
        .map(|kl| {
            coefficient = controller.update(coefficient, kl, golden.param("n_steps") as usize);
            coefficient
        })
        .collect();
    golden.check_numbers("coef_after_update", &after, false);
}

#[test]
fn golden_ema() {
    let golden = Golden::load("ema");
    for dtype in TYPES {
        let mut average = golden.input("init", dtype);
        let steps = golden.value["inputs"]["params"].as_array().unwrap();
        let wanted = golden.value["outputs"]["ema_after_step"].as_array().unwrap();
        assert_eq!(steps.len(), wanted.len());
        for (step, want) in steps.iter().zip(wanted) {
            average = ema::update(&average, &tensor(step, dtype), golden.param("decay")).unwrap();
            golden.check_values("ema_after_step", &flat(&average), &numbers(want), dtype == DType::F32);
        }
    }
}

#[test]
fn golden_position_ids_are_places_in_the_unpadded_sequence() {
    let golden = Golden::load("position_ids");
    let mask = rows(&golden.value["inputs"]["attention_mask"]);
    let (mut exclusive, mut clamped) = (Vec::new(), Vec::new());
    for row in &mask {
        let tokens: Vec<u32> = vec![0; row.iter().filter(|&&m| m == 1).count() + 1];
        let batch = rehearsal::lm::Batch::new([rehearsal::lm::Sequence { prompt: &[], completion: &tokens }]);
        let places: Vec<f64> = batch.positions().iter().map(|&p| f64::from(p)).collect();
        let (mut seen, mut place) = (0.0, places.iter());
        for &m in row {
            // What padding is given differs between the peers and is never read.
            exclusive.push(if m == 1 { *place.next().unwrap() } else { seen });
            clamped.push(if m == 1 { seen } else { 0.0 });
            seen += f64::from(m);
        }
        assert_eq!(place.count(), 0);
    }
    golden.check_numbers("exclusive_cumsum", &exclusive, false);
    golden.check_numbers("clamped", &clamped, false);
}

#[test]
fn golden_sums_over_the_completion_are_the_sequence_logprobs() {
    let golden = Golden::load("dpo_sigmoid");
    let per_token = golden.input("policy_chosen_token_logps", DType::F64);
    let mask = golden.input("chosen_mask", DType::F64);
    let (mut packed, mut spans) = (Vec::new(), vec![0]);
    for (row, mask) in per_token.to_vec2::<f64>().unwrap().iter().zip(mask.to_vec2::<f64>().unwrap()) {
        packed.extend(row.iter().zip(mask).filter(|(_, m)| *m == 1.0).map(|(x, _)| *x));
        spans.push(packed.len());
    }
    let packed = Tensor::new(packed, &candle_core::Device::Cpu).unwrap();
    let want = flat(&golden.input("policy_chosen_logps", DType::F64));
    golden.check_values("policy_chosen_logps", &flat(&token::span_sums(&packed, &spans).unwrap()), &want, false);
}

#[test]
fn golden_online_dpo_pairs() {
    let golden = Golden::load("online_dpo_pairs");
    let penalty = golden.param("missing_eos_penalty");
    let scores = |which: &str| -> Vec<f64> {
        let rewards = flat(&golden.input(&format!("rewards_{which}"), DType::F64));
        let ended = flat(&golden.input(&format!("contains_eos_{which}"), DType::F64));
        rewards.iter().zip(ended).map(|(&r, e)| penalise_missing_eos(r, e == 1.0, penalty)).collect()
    };
    let (first, second) = (scores("1"), scores("2"));
    let n = first.len();
    let interleaved: Vec<f64> = first.iter().zip(&second).flat_map(|(a, b)| [*a, *b]).collect();
    let pairs = select_pairs(&interleaved, 2, TieRule::First);
    // The file counts all first samples, then all second ones.
    let place = |i: usize| (i / 2 + (i % 2) * n) as f64;
    let all = |f: &dyn Fn(&rehearsal_learn::Pair) -> f64| -> Vec<f64> {
        pairs.iter().map(|p| f(p.as_ref().unwrap())).collect()
    };
    golden.check_numbers("chosen_index", &all(&|p| place(p.chosen)), false);
    golden.check_numbers("rejected_index", &all(&|p| place(p.rejected)), false);
    golden.check_numbers("score_margin", &all(&|p| p.margin), false);
}
