use candle_core::{DType, Tensor, Var};
use rehearsal_learn::KlEstimator;
use rehearsal_learn::group::{GroupScale, grpo, rloo};
use rehearsal_learn::importance::{BoundOn, ImportanceConfig, OutOfBounds, WeightLevel, importance_weights};
use rehearsal_learn::pairs::penalise_missing_eos;
use rehearsal_learn::ppo::{
    Aggregation, PolicyLossConfig, PolicyTokens, RatioLevel, ScorePlacement, TokenRewards, Whitening, gae,
    instructgpt_objective, policy_loss, value_loss, whiten,
};

use super::{Golden, Packing, TYPES, flat, rows};

fn estimator(name: &str) -> KlEstimator {
    match name {
        "k1" => KlEstimator::K1,
        "k2" => KlEstimator::K2,
        "k3" => KlEstimator::K3,
        "abs" => KlEstimator::Abs,
        other => panic!("estimator {other}"),
    }
}

#[test]
fn golden_gae() {
    for name in ["gae_nopad", "gae_padded", "gae_mc", "gae_whiten_rewards"] {
        let golden = Golden::load(name);
        let packing = Packing::new(&golden, "mask");
        let (gamma, lambda) = (golden.param("gamma"), golden.param("lambda"));
        // The peer zeroes what is outside the mask and goes through whole rows; it whitens the zeros too.
        let mask = golden.input("mask", DType::F64);
        let row = |key: &str| (golden.input(key, DType::F64) * &mask).unwrap().to_vec2::<f64>().unwrap();
        let (values, mut rewards) = (row("values"), row("rewards"));
        if golden.value["params"]["whiten_rewards"].as_bool().unwrap() {
            let whitening = Whitening::of(&packing.rows(&golden.input("rewards", DType::F64)).concat(), true, false);
            rewards.iter_mut().flatten().for_each(|r| *r = whitening.apply(*r));
        }
        let (mut all, mut all_returns) = (Vec::new(), Vec::new());
        for (values, rewards) in values.iter().zip(&rewards) {
            let (a, g) = gae(values, rewards, gamma, lambda);
            all.extend(a);
            all_returns.extend(g);
        }
        golden.check_numbers("advantages", &all, false);
        golden.check_numbers("returns", &all_returns, false);
        let advantages = flat(&packing.pack(&Tensor::new(all, mask.device()).unwrap()));
        packing.check(&golden, "advantages_masked", &advantages, false);
        for (key, unbiased) in [("whitened_advantages_masked", true), ("whitened_biased_masked", false)] {
            let mut whitened = advantages.clone();
            whiten(&mut whitened, unbiased, true);
            packing.check(&golden, key, &whitened, false);
        }
    }
}

#[test]
fn golden_token_rewards() {
    for name in ["k1", "k2", "k3", "abs", "score_clip"] {
        let golden = Golden::load(&format!("kl_rewards_{name}"));
        let packing = Packing::new(&golden, "mask");
        assert_eq!(golden.param_text("placement"), "last_token");
        let config = TokenRewards {
            kl_coef: golden.param("kl_coef"),
            estimator: estimator(golden.param_text("estimator")),
            placement: ScorePlacement::LastToken,
            score_clip: golden.option("score_clip"),
        };
        let (logprobs, reference) = (golden.input("logprobs", DType::F64), golden.input("ref_logprobs", DType::F64));
        let all = |of: &dyn Fn(f64) -> f64| -> Vec<f64> {
            flat(&logprobs).iter().zip(flat(&reference)).map(|(&p, r)| of(config.estimator.of(p, r))).collect()
        };
        golden.check_numbers("kl", &all(&|kl| kl), false);
        if golden.value["outputs"].get("non_score_reward").is_some() {
            golden.check_numbers("non_score_reward", &all(&|kl| -config.kl_coef * kl), false);
        }
        let scores = flat(&golden.input("scores", DType::F64));
        let (logprobs, reference) = (packing.rows(&logprobs), packing.rows(&reference));
        let rewards: Vec<f64> = (scores.iter().zip(&logprobs).zip(&reference))
            .flat_map(|((&score, p), r)| config.of(score, p, r, false))
            .collect();
        packing.check(&golden, "rewards_masked", &rewards, false);
        if golden.value["outputs"].get("kl_seq_sum_mean").is_some() {
            let kl = |(p, r): (&Vec<f64>, &Vec<f64>)| -> f64 {
                p.iter().zip(r).map(|(&p, &r)| config.estimator.of(p, r)).sum()
            };
            let mean = logprobs.iter().zip(&reference).map(kl).sum::<f64>() / scores.len() as f64;
            golden.check_numbers("kl_seq_sum_mean", &[mean], false);
        }
    }
}

#[test]
fn golden_advantages_with_the_score_one_past_the_end() {
    let golden = Golden::load("ppo_advantages_nplus");
    let packing = Packing::new(&golden, "mask");
    let config = TokenRewards {
        kl_coef: golden.param("kl_coef"),
        estimator: KlEstimator::K1,
        placement: ScorePlacement::OnePast,
        score_clip: None,
    };
    let row = |key: &str| golden.input(key, DType::F64).to_vec2::<f64>().unwrap();
    let (logprobs, reference, values) = (row("logprobs"), row("ref_logprobs"), row("values"));
    let scores = flat(&golden.input("scores", DType::F64));
    let width = values[0].len();
    let (mut all_rewards, mut all_returns, mut value_mask, mut places) = (vec![], vec![], vec![], vec![]);
    let mut advantages = Vec::new();
    for (s, w) in packing.spans.windows(2).enumerate() {
        let n = w[1] - w[0];
        let rewards = config.of(scores[s], &logprobs[s][..n], &reference[s][..n], n < width);
        let (a, g) = gae(&values[s][..rewards.len()], &rewards, golden.param("gamma"), golden.param("lambda"));
        advantages.extend_from_slice(&a[..n]);
        places.push((rewards.len() - 1) as f64);
        let padded = |x: &[f64]| [x, &vec![0.0; width - x.len()]].concat();
        all_rewards.extend(padded(&rewards));
        all_returns.extend(padded(&g));
        value_mask.extend(padded(&vec![1.0; rewards.len()]));
    }
    golden.check_numbers("rewards", &all_rewards, false);
    golden.check_numbers("reward_index", &places, false);
    golden.check_numbers("value_mask", &value_mask, false);
    golden.check_numbers("returns", &all_returns, false);
    for (key, unbiased) in [("advantages_whitened", true), ("advantages_whitened_biased", false)] {
        let mut whitened = advantages.clone();
        whiten(&mut whitened, unbiased, true);
        packing.check(&golden, key, &whitened, false);
    }
}

fn aggregation(golden: &Golden) -> Aggregation {
    match (golden.param_text("aggregation"), golden.param_text("loss_type")) {
        ("token_mean", _) | (_, "bnpo" | "dapo") => Aggregation::TokenMean,
        ("seq_mean", _) | (_, "grpo") => Aggregation::SequenceMean,
        (_, "dr_grpo") => Aggregation::Constant(golden.param("max_completion_length")),
        other => panic!("aggregation {other:?}"),
    }
}

#[test]
fn golden_ppo_policy_losses() {
    let names = ["", "_first_epoch", "_dual_clip", "_clip_higher", "_seq_mean", "_log_ratio_clamp"];
    for golden in names.map(|name| Golden::load(&format!("ppo_policy_loss{name}"))) {
        let packing = Packing::new(&golden, "mask");
        let config = PolicyLossConfig {
            clip_low: golden.param("clip_low"),
            clip_high: golden.param("clip_high"),
            dual_clip: golden.option("dual_clip"),
            log_ratio_clamp: golden.option("log_ratio_clamp"),
            aggregation: aggregation(&golden),
            ..Default::default()
        };
        for dtype in TYPES {
            let single = dtype == DType::F32;
            let packed = |key: &str| packing.pack(&golden.input(key, dtype));
            let logprobs = Var::from_tensor(&packed("logprobs")).unwrap();
            let tokens = PolicyTokens {
                logprobs: &logprobs,
                old_logprobs: &packed("old_logprobs"),
                advantages: &packed("advantages"),
                ref_logprobs: None,
                entropies: None,
                weights: None,
                spans: &packing.spans,
            };
            let loss = policy_loss(&tokens, &config, packing.whole()).unwrap();
            golden.check("loss", &loss.loss);
            let grads = loss.loss.backward().unwrap();
            packing.check(&golden, "grad_logprobs", &flat(grads.get(&logprobs).unwrap()), single);
            let wanted = Tensor::new(golden.output("ratio"), logprobs.device()).unwrap();
            golden.check_values("ratio", &flat(&loss.ratios), &flat(&packing.pack(&wanted)), single);
            let n = packing.whole().tokens as f64;
            golden.check_numbers("clipfrac", &[loss.clipped / n], single);
            golden.check_numbers("approx_kl", &[loss.approx_kl / n], single);
            golden.check_numbers("policy_kl", &[loss.policy_kl / n], single);
            golden.check_numbers("mean_ratio", &[loss.ratio / n], single);
        }
    }
}

#[test]
fn golden_ppo_value_losses() {
    for name in ["clipped", "unclipped"] {
        let golden = Golden::load(&format!("ppo_value_loss_{name}"));
        let packing = Packing::new(&golden, "mask");
        for dtype in TYPES {
            let packed = |key: &str| packing.pack(&golden.input(key, dtype));
            let values = Var::from_tensor(&packed("values")).unwrap();
            let clip = golden.option("clip_value");
            let loss = value_loss(&values, &packed("old_values"), &packed("returns"), clip, packing.whole()).unwrap();
            golden.check("loss", &loss.loss);
            let grads = loss.loss.backward().unwrap();
            packing.check(&golden, "grad_values", &flat(grads.get(&values).unwrap()), dtype == DType::F32);
            golden.check_numbers("clipfrac", &[loss.clipped / packing.whole().tokens as f64], dtype == DType::F32);
        }
    }
}

#[test]
fn golden_group_advantages() {
    let golden = Golden::load("rloo_advantages");
    let (rewards, group) = (flat(&golden.input("rewards", DType::F64)), golden.param("group_size") as usize);
    let advantages = rloo(&rewards, group);
    golden.check_numbers("advantages", &advantages, false);
    let baseline: Vec<f64> = rewards.iter().zip(&advantages).map(|(r, a)| r - a).collect();
    golden.check_numbers("baseline", &baseline, false);

    let golden = Golden::load("grpo_advantages");
    let (rewards, group) = (flat(&golden.input("rewards", DType::F64)), golden.param("group_size") as usize);
    for (key, scale) in [
        ("advantages_group", GroupScale::Group),
        ("advantages_batch", GroupScale::Batch),
        ("advantages_none", GroupScale::None),
    ] {
        golden.check_numbers(key, &grpo(&rewards, group, scale, golden.param("eps")), false);
    }
}

fn group_loss(golden: &Golden, config: &PolicyLossConfig) {
    let packing = Packing::new(golden, "mask");
    for dtype in TYPES {
        let packed = |key: &str| packing.pack(&golden.input(key, dtype));
        let logprobs = Var::from_tensor(&packed("logprobs")).unwrap();
        // One advantage for each sequence.
        let advantages = golden.input("advantages", dtype);
        let spread: Vec<Tensor> = packing
            .spans
            .windows(2)
            .enumerate()
            .map(|(s, w)| advantages.narrow(0, s, 1).unwrap().repeat(w[1] - w[0]).unwrap())
            .collect();
        let reference = config.kl.map(|_| packed("ref_logprobs"));
        let weights = golden.has_input("importance_sampling_ratio").then(|| {
            // One for each token, or one for each sequence.
            let ratios = golden.input("importance_sampling_ratio", dtype);
            let width = golden.input("mask", dtype).dim(1).unwrap();
            packing.pack(&ratios.repeat((1, width / ratios.dim(1).unwrap())).unwrap())
        });
        let tokens = PolicyTokens {
            logprobs: &logprobs,
            old_logprobs: &packed("old_logprobs"),
            advantages: &Tensor::cat(&spread, 0).unwrap(),
            ref_logprobs: reference.as_ref(),
            entropies: None,
            weights: weights.as_ref(),
            spans: &packing.spans,
        };
        let loss = policy_loss(&tokens, config, packing.whole()).unwrap().loss;
        golden.check("loss", &loss);
        let grads = loss.backward().unwrap();
        packing.check(golden, "grad_logprobs", &flat(grads.get(&logprobs).unwrap()), dtype == DType::F32);
    }
}

#[test]
fn golden_grpo_losses() {
    for name in ["grpo", "grpo_kl", "bnpo_kl", "dr_grpo", "dapo", "grpo_seq", "tis_token", "tis_sequence"] {
        let golden = Golden::load(&format!("grpo_loss_{name}"));
        let beta = golden.param("beta");
        let level = match golden.param_text("importance_sampling_level") {
            "token" => RatioLevel::Token,
            _ => RatioLevel::SequenceMean,
        };
        let config = PolicyLossConfig {
            clip_low: golden.param("clip_low"),
            clip_high: golden.param("clip_high"),
            aggregation: aggregation(&golden),
            level,
            kl: (beta > 0.0).then_some((KlEstimator::K3, beta)),
            ..Default::default()
        };
        group_loss(&golden, &config);
    }
}

/// The setting of importance weights that a file's parameters name.
fn importance(golden: &Golden) -> ImportanceConfig {
    let mode = golden.param_text("mode");
    let (level, outside) = match (golden.param_text("level"), golden.param_text("action"), mode) {
        ("token", "clamp", _) | (_, _, "token_truncate") => (WeightLevel::Token, OutOfBounds::Truncate),
        ("token", "mask", _) | (_, _, "token_mask") => (WeightLevel::Token, OutOfBounds::Mask),
        ("sequence", "mask", _) => (WeightLevel::SequenceMean, OutOfBounds::Mask),
        ("sequence", "clamp", _) => (WeightLevel::SequenceMean, OutOfBounds::Truncate),
        (_, _, "sequence_truncate") => (WeightLevel::SequenceSum, OutOfBounds::Truncate),
        (_, _, "sequence_mask") => (WeightLevel::SequenceSum, OutOfBounds::Mask),
        other => panic!("weights {other:?}"),
    };
    let bound_on = if golden.param_text("metric") == "kl_k3" { BoundOn::K3 } else { BoundOn::Ratio };
    let (low, high) = if mode.is_empty() { ("lower", "upper") } else { ("clip_min", "clip_max") };
    ImportanceConfig { level, outside, bound_on, low: golden.option(low), high: golden.option(high) }
}

#[test]
fn golden_importance_weights() {
    for mode in ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] {
        for sides in ["", "_two_sided"] {
            let golden = Golden::load(&format!("tis_{mode}{sides}"));
            let packing = Packing::new(&golden, "mask");
            let (old, sampler) = (
                packing.rows(&golden.input("old_logprobs", DType::F64)),
                packing.rows(&golden.input("sampling_logprobs", DType::F64)),
            );
            let config = importance(&golden);
            let rows = old.iter().zip(&sampler).map(|(old, sampler)| importance_weights(old, sampler, &config));
            if config.level == WeightLevel::Token {
                // The peer has 1 at padding.
                let wanted = Tensor::new(golden.output("ratio"), &candle_core::Device::Cpu).unwrap();
                let got: Vec<f64> = rows.flatten().collect();
                golden.check_values("ratio", &got, &flat(&packing.pack(&wanted)), false);
            } else {
                golden.check_numbers("ratio", &rows.map(|row| row[0]).collect::<Vec<_>>(), false);
            }
        }
    }
}

#[test]
fn golden_decoupled_losses() {
    for name in ["uncapped", "capped", "truncated", "sequence", "kl_k3"] {
        let golden = Golden::load(&format!("decoupled_ppo_{name}"));
        let packing = Packing::new(&golden, "mask");
        let rows = |key: &str| packing.rows(&golden.input(key, DType::F64));
        let (proximal, behaviour) = (rows("proximal_logprobs"), rows("behaviour_logprobs"));
        let config = importance(&golden);
        let of = |(old, sampler): (&Vec<f64>, &Vec<f64>)| importance_weights(old, sampler, &config);
        let weights = proximal.iter().zip(&behaviour).map(of).collect::<Vec<_>>().concat();
        packing.check(&golden, "behaviour_weight", &weights, false);
        let kept: Vec<f64> = weights.iter().map(|w| f64::from(u8::from(*w != 0.0))).collect();
        packing.check(&golden, "kept", &kept, false);
        for dtype in TYPES {
            let packed = |key: &str| packing.pack(&golden.input(key, dtype));
            let logprobs = Var::from_tensor(&packed("logprobs")).unwrap();
            let weights = Tensor::new(weights.as_slice(), logprobs.device()).unwrap().to_dtype(dtype).unwrap();
            let tokens = PolicyTokens {
                logprobs: &logprobs,
                old_logprobs: &packed("proximal_logprobs"),
                advantages: &packed("advantages"),
                ref_logprobs: None,
                entropies: None,
                weights: Some(&weights),
                spans: &packing.spans,
            };
            let (clip_low, clip_high) = (golden.param("clip_low"), golden.param("clip_high"));
            let config = PolicyLossConfig { clip_low, clip_high, ..Default::default() };
            let loss = policy_loss(&tokens, &config, packing.whole()).unwrap().loss;
            golden.check("loss", &loss);
            let grads = loss.backward().unwrap();
            packing.check(&golden, "grad_logprobs", &flat(grads.get(&logprobs).unwrap()), dtype == DType::F32);
        }
    }
}

#[test]
fn golden_rloo_loss() {
    let golden = Golden::load("rloo_loss");
    let clip = golden.param("clip");
    let config = PolicyLossConfig {
        clip_low: clip,
        clip_high: clip,
        aggregation: Aggregation::SequenceMean,
        level: RatioLevel::SequenceSum,
        ..Default::default()
    };
    group_loss(&golden, &config);
}

#[test]
fn golden_instructgpt_objective() {
    let golden = Golden::load("instructgpt_objective");
    let packing = Packing::new(&golden, "mask");
    let row = |key: &str| packing.rows(&golden.input(key, DType::F64));
    let log_ratios: Vec<f64> = row("logprobs")
        .iter()
        .zip(row("ref_logprobs"))
        .map(|(p, r)| p.iter().zip(r).map(|(p, r)| p - r).sum())
        .collect();
    let scores = flat(&golden.input("scores", DType::F64));
    let pretraining = flat(&golden.input("pretrain_logprobs", DType::F64));
    let (beta, gamma) = (golden.param("beta"), golden.param("gamma"));
    let value = |pretraining: &[f64], gamma| instructgpt_objective(&scores, &log_ratios, beta, pretraining, gamma);
    golden.check_numbers("reward_term", &[value(&[], 0.0)], false);
    golden.check_numbers("pretrain_term", &[instructgpt_objective(&[], &[], beta, &pretraining, 1.0)], false);
    golden.check_numbers("objective", &[value(&pretraining, gamma)], false);
}

#[test]
fn golden_responses_end_at_their_first_eos() {
    let golden = Golden::load("response_postprocess");
    let (eos, pad) = (golden.param("eos_token_id") as u32, golden.param("pad_token_id"));
    let scores = flat(&golden.input("scores", DType::F64));
    let (mut truncated, mut last, mut ends, mut mask) = (vec![], vec![], vec![], vec![]);
    let (mut penalised, mut fixed) = (vec![], vec![]);
    for (row, &score) in rows(&golden.value["inputs"]["responses"]).iter().zip(&scores) {
        let kept = rehearsal::lm::generate::until_eos(row, &[eos]);
        let ended = kept.last() == Some(&eos);
        let padded = |x: Vec<f64>, fill: f64| [x.as_slice(), &vec![fill; row.len() - kept.len()]].concat();
        truncated.extend(padded(kept.iter().map(|&t| f64::from(t)).collect(), pad));
        mask.extend(padded(vec![1.0; kept.len()], 0.0));
        last.push(kept.len() as f64 - 1.0);
        ends.push(f64::from(ended));
        penalised.push(penalise_missing_eos(score, ended, golden.param("missing_eos_penalty")));
        fixed.push(if ended { score } else { golden.param("nplus_fixed_score") });
    }
    golden.check_numbers("truncated", &truncated, false);
    golden.check_numbers("mask", &mask, false);
    golden.check_numbers("last_index", &last, false);
    golden.check_numbers("contains_eos", &ends, false);
    golden.check_numbers("scores_trl", &penalised, false);
    golden.check_numbers("scores_nplus", &fixed, false);
}
