use candle_core::{DType, Tensor, Var};
use rehearsal_learn::pairs::penalise_missing_eos;
use rehearsal_learn::{
    PreferenceConfig, PreferenceKind, PreferenceLogprobs, TieRule, masked, preference_loss, select_pairs, token,
};

use super::{Golden, TYPES, flat};

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
fn golden_preference_losses() {
    let files = [
        ("dpo_sigmoid", PreferenceKind::Sigmoid),
        ("dpo_sigmoid_extreme", PreferenceKind::Sigmoid),
        ("dpo_cdpo", PreferenceKind::Sigmoid),
        ("dpo_robust", PreferenceKind::Robust),
        ("dpo_sigmoid_norm", PreferenceKind::SigmoidNorm),
        ("dpo_hinge", PreferenceKind::Hinge),
        ("dpo_ipo", PreferenceKind::Ipo),
        ("dpo_ipo_sum", PreferenceKind::IpoSum),
    ];
    for (name, kind) in files {
        let golden = Golden::load(name);
        let config =
            PreferenceConfig { kind, beta: golden.param("beta"), label_smoothing: golden.param("label_smoothing") };
        for dtype in TYPES {
            let input = |key: &str| golden.input(key, dtype);
            let tokens = |key: &str| input(key).sum(1).unwrap();
            let chosen = Var::from_tensor(&input("policy_chosen_logps")).unwrap();
            let rejected = Var::from_tensor(&input("policy_rejected_logps")).unwrap();
            let loss = preference_loss(
                &PreferenceLogprobs {
                    policy_chosen: &chosen,
                    policy_rejected: &rejected,
                    ref_chosen: &input("ref_chosen_logps"),
                    ref_rejected: &input("ref_rejected_logps"),
                    chosen_tokens: &tokens("chosen_mask"),
                    rejected_tokens: &tokens("rejected_mask"),
                },
                &config,
            )
            .unwrap();
            golden.check("losses", &loss.losses);
            let mean = loss.losses.mean_all().unwrap();
            golden.check("loss", &mean);
            let grads = mean.backward().unwrap();
            golden.check("grad_policy_chosen_logps", grads.get(&chosen).unwrap());
            golden.check("grad_policy_rejected_logps", grads.get(&rejected).unwrap());
            golden.check("chosen_rewards", &loss.chosen_rewards);
            golden.check("rejected_rewards", &loss.rejected_rewards);
            golden.check("margins", &loss.margins().unwrap());
            let margins = flat(&loss.margins().unwrap());
            let accuracy = margins.iter().filter(|&&m| m > 0.0).count() as f64 / margins.len() as f64;
            golden.check_numbers("accuracy", &[accuracy], dtype == DType::F32);
        }
    }
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
