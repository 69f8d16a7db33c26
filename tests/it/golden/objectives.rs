use candle_core::{DType, Tensor, Var};
use rehearsal_learn::pairs::{Pair, TieRule, penalise_missing_eos, select_pair};
use rehearsal_learn::ppo::{Aggregation, Whitening, aggregate, whiten};
use rehearsal_learn::{AdaptiveKl, BatchTotals, KlEstimator, NllReduction, ema, kl, sft, token};
use rehearsal_lm::ops::logprobs;

use super::{Golden, Packing, TYPES, flat, numbers, rows, tensor};

/// The masked mean, as losses take it over the tokens of a batch.
fn token_mean(packing: &Packing, padded: &Tensor) -> Tensor {
    aggregate(&packing.pack(padded), &packing.spans, Aggregation::TokenMean, packing.whole()).unwrap()
}

#[test]
fn golden_masked_statistics() {
    let golden = Golden::load("masked_stats");
    let packing = Packing::new(&golden, "mask");
    for dtype in TYPES {
        let values = golden.input("values", dtype);
        golden.check("mean", &token_mean(&packing, &values));
        let packed = packing.pack(&values);
        let row_mean = |span: &[usize]| {
            let (row, spans) = (packed.narrow(0, span[0], span[1] - span[0]).unwrap(), [0, span[1] - span[0]]);
            let whole = BatchTotals { sequences: 1, tokens: spans[1] };
            flat(&aggregate(&row, &spans, Aggregation::SequenceMean, whole).unwrap())
        };
        let means: Vec<f64> = packing.spans.windows(2).flat_map(row_mean).collect();
        golden.check_numbers("row_mean", &means, dtype == DType::F32);
    }
    // Statistics of what is detached from the graph are f64. What lies outside the mask is whitened by them, too.
    let values = golden.input("values", DType::F64);
    let (packed, all) = (packing.rows(&values).concat(), flat(&values));
    assert_eq!(golden.param("eps"), 1e-8);
    for (key, unbiased) in [("var_unbiased", true), ("var_biased", false)] {
        let whitening = Whitening::of(&packed, unbiased, true);
        let scale = whitening.apply(1.0) - whitening.apply(0.0);
        golden.check_numbers(key, &[1.0 / (scale * scale) - 1e-8], false);
    }
    for (key, unbiased, shift_mean) in [
        ("whitened_unbiased_shift", true, true),
        ("whitened_unbiased_noshift", true, false),
        ("whitened_biased_shift", false, true),
    ] {
        let whitening = Whitening::of(&packed, unbiased, shift_mean);
        let whitened: Vec<f64> = all.iter().map(|&x| whitening.apply(x)).collect();
        golden.check_numbers(key, &whitened, false);
        let mut in_place = packed.clone();
        whiten(&mut in_place, unbiased, shift_mean);
        let kept = flat(&packing.pack(&Tensor::new(whitened, values.device()).unwrap()));
        assert_eq!(in_place, kept, "{key}");
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
            let logprobs = logprobs(&rows, &targets, 1.0, false).unwrap();
            let loss = sft::nll(&logprobs, &spans, reduction, whole).unwrap();
            golden.check("loss", &loss);
            golden.check("grad_logits", loss.backward().unwrap().get(&logits).unwrap());
        }
    }
}

#[test]
fn golden_kl() {
    let golden = Golden::load("kl_estimators");
    let packing = Packing::new(&golden, "mask");
    for dtype in TYPES {
        let reference = golden.input("ref_logprobs", dtype);
        for (name, estimator) in
            [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3), ("abs", KlEstimator::Abs)]
        {
            let logprobs = Var::from_tensor(&golden.input("logprobs", dtype)).unwrap();
            let kl = estimator.tensor(&logprobs, &reference).unwrap();
            golden.check(name, &kl);
            let scalars: Vec<f64> =
                flat(&logprobs).iter().zip(flat(&reference)).map(|(&p, r)| estimator.of(p, r)).collect();
            golden.check_numbers(name, &scalars, dtype == DType::F32);
            let mean = token_mean(&packing, &kl);
            golden.check(&format!("masked_mean_{name}"), &mean);
            golden.check(&format!("grad_masked_mean_{name}"), mean.backward().unwrap().get(&logprobs).unwrap());
        }
    }
    let golden = Golden::load("kl_full");
    let packing = Packing::new(&golden, "mask");
    for dtype in TYPES {
        let logits = Var::from_tensor(&golden.input("logits", dtype)).unwrap();
        let kl = kl::full(&logits, &golden.input("ref_logits", dtype)).unwrap();
        golden.check("kl", &kl);
        let mean = token_mean(&packing, &kl);
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
    let pairs: Vec<Pair> =
        first.iter().zip(&second).filter_map(|(&a, &b)| select_pair(&[a, b], TieRule::First)).collect();
    assert_eq!(pairs.len(), n);
    // The file counts all first samples, then all second ones.
    let all =
        |f: &dyn Fn(usize, &Pair) -> f64| -> Vec<f64> { pairs.iter().enumerate().map(|(i, p)| f(i, p)).collect() };
    golden.check_numbers("chosen_index", &all(&|i, p| (i + p.chosen * n) as f64), false);
    golden.check_numbers("rejected_index", &all(&|i, p| (i + p.rejected * n) as f64), false);
    golden.check_numbers("score_margin", &all(&|_, p| p.margin), false);
}
