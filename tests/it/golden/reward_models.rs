use candle_core::{DType, Tensor, Var};
use rehearsal_learn::reward::{Normalisation, PairCount, Pairwise, PairwiseConfig, kwise, pairwise};
use rehearsal_learn::rso;
use serde_json::Value;

use super::{Golden, TYPES, flat, numbers, tensor};

#[test]
fn golden_reward_model_pairs() {
    let names = ["", "_margin", "_centering", "_margin_centering", "_extreme"];
    for golden in names.map(|name| Golden::load(&format!("rm_pairwise{name}"))) {
        let config = PairwiseConfig { centering: golden.option("center_rewards_coefficient").unwrap_or(0.0) };
        for dtype in TYPES {
            let chosen = Var::from_tensor(&golden.input("chosen_rewards", dtype)).unwrap();
            let rejected = Var::from_tensor(&golden.input("rejected_rewards", dtype)).unwrap();
            let margin = golden.value["inputs"].get("margin").map(|_| golden.input("margin", dtype));
            let x = Pairwise { chosen: &chosen, rejected: &rejected, margin: margin.as_ref(), probability: None };
            let losses = pairwise(&x, &config).unwrap();
            if golden.value["outputs"].get("losses").is_some() {
                golden.check("losses", &losses);
            }
            let mean = losses.mean_all().unwrap();
            golden.check("loss", &mean);
            let grads = mean.backward().unwrap();
            golden.check("grad_chosen", grads.get(&chosen).unwrap());
            golden.check("grad_rejected", grads.get(&rejected).unwrap());
            let gaps: Vec<f64> = flat(&chosen).iter().zip(flat(&rejected)).map(|(c, r)| c - r).collect();
            let share = gaps.iter().filter(|&&g| g > 0.0).count() as f64 / gaps.len() as f64;
            golden.check_numbers("accuracy", &[share], true); // the peer counts in f32
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            golden.check_numbers("mean_margin", &[mean], dtype == DType::F32);
        }
    }
}

#[test]
fn golden_reward_model_rankings() {
    for name in ["rm_kwise", "rm_kwise_ties"] {
        let golden = Golden::load(name);
        let count = match golden.param_text("normalizer") {
            "k_choose_2" => PairCount::All,
            "valid_pairs" => PairCount::Untied,
            other => panic!("{name}: normalizer {other}"),
        };
        let list = |value: &Value| value.as_array().unwrap().clone();
        let (rewards, ranks) = (list(&golden.value["inputs"]["rewards"]), list(&golden.value["inputs"]["ranks"]));
        let wanted = list(&golden.value["outputs"]["grads"]);
        for dtype in TYPES {
            let single = dtype == DType::F32;
            let rewards: Vec<Var> = rewards.iter().map(|r| Var::from_tensor(&tensor(r, dtype)).unwrap()).collect();
            let losses: Vec<Tensor> = rewards
                .iter()
                .zip(&ranks)
                .map(|(r, ranks)| {
                    let ranks: Vec<u32> = numbers(ranks).iter().map(|&x| x as u32).collect();
                    kwise(r, &ranks, count).unwrap().expect("not all tied")
                })
                .collect();
            let losses = Tensor::stack(&losses, 0).unwrap();
            golden.check("per_prompt", &losses);
            let mean = losses.mean_all().unwrap();
            golden.check("loss", &mean);
            let grads = mean.backward().unwrap();
            for (reward, want) in rewards.iter().zip(&wanted) {
                golden.check_values("grads", &flat(grads.get(reward).unwrap()), &numbers(want), single);
            }
        }
    }
}

#[test]
fn golden_reward_normalisation() {
    let golden = Golden::load("rm_normalize");
    let demonstrations = flat(&golden.input("demo_rewards", DType::F64));
    let rewards = flat(&golden.input("rewards", DType::F64));
    let apply = |n: &Normalisation| -> Vec<f64> { rewards.iter().map(|&r| n.apply(r)).collect() };
    let (shift, scale) = (Normalisation::of(&demonstrations, false), Normalisation::of(&demonstrations, true));
    golden.check_numbers("bias", &[shift.mean], false);
    golden.check_numbers("std_unbiased", &[scale.std], false);
    golden.check_numbers("shifted", &apply(&shift), false);
    golden.check_numbers("standardized", &apply(&scale), false);
}

#[test]
fn golden_rejection_sampling() {
    let golden = Golden::load("rso_sampling");
    let rewards = flat(&golden.input("rewards", DType::F64));
    let uniforms = flat(&golden.input("uniforms", DType::F64));
    let (beta, keep) = (golden.param("beta"), golden.param("num_samples") as usize);
    golden.check_numbers("first_pass_accept_prob", &rso::acceptance(&rewards, beta), false);
    golden.check_numbers("optimal_policy_weights", &rso::optimal_weights(&rewards, beta), false);
    let mut used = 0;
    let accepted = rso::rejection_sampling(&rewards, beta, keep, |n| {
        used = n + 1;
        uniforms[n as usize]
    });
    golden.check_numbers("accepted", &accepted.iter().map(|&i| i as f64).collect::<Vec<_>>(), false);
    golden.check_numbers("uniforms_used", &[used as f64], false);
    // How often each candidate is among the accepted, by simulation, against the file's exact figures.
    let stream = rehearsal::lm::random::Stream::new(5, 5);
    let (rounds, mut counts) = (40_000u64, vec![0.0; rewards.len()]);
    for round in 0..rounds {
        for i in rso::rejection_sampling(&rewards, beta, keep, |n| stream.uniform(round * 1000 + n)) {
            counts[i] += 1.0 / rounds as f64;
        }
    }
    for (got, want) in counts.iter().zip(golden.output("inclusion_prob")) {
        // Five standard errors of a share.
        assert!((got - want).abs() < 5.0 * (0.25 / rounds as f64).sqrt(), "{counts:?}");
    }
}
