//! Whole training steps, from token ids to the parameters after the optimiser.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var, safetensors};
use rehearsal_learn::ppo::{
    PolicyLossConfig, PolicyTokens, ScorePlacement, TokenRewards, gae, policy_loss, value_loss, whiten,
};
use rehearsal_learn::preference::{SftTerm, chosen_nll};
use rehearsal_learn::{
    AdamW, AdamWConfig, BatchTotals, KlEstimator, NllReduction, PreferenceConfig, PreferenceLogprobs, clip_scale,
    global_norm, preference_loss, sft, token,
};
use rehearsal_lm::{Batch, Gradients, Sequence};

use super::models::{Machine, machines, trainable, unpadded};
use super::{Golden, Packing, flat, folder, rows};

#[test]
fn golden_dpo_and_rpo_steps() {
    for name in ["tiny-llama/dpo_step", "tiny-llama/rpo_step"] {
        let golden = Golden::load(name);
        for dtype in [DType::F32, DType::F64] {
            for machine in machines(dtype) {
                preference_step(&golden, dtype, machine);
            }
        }
    }
}

/// Losses are computed on the host, wherever the model is.
fn host(t: &Tensor) -> Tensor {
    t.to_device(&Device::Cpu).unwrap()
}

fn preference_step(golden: &Golden, dtype: DType, machine: Machine) {
    let params = &golden.value["params"];
    let single = dtype == DType::F32;
    let policy = machine.run(trainable("tiny-llama", dtype));
    let reference = machine.run(trainable(golden.param_text("reference").trim_start_matches("../"), dtype));

    let sequences = unpadded(golden, "");
    let completion_masks = rows(&golden.value["inputs"]["completion_mask"]);
    let prompts: Vec<usize> = completion_masks.iter().map(|m| m.iter().position(|&x| x == 1).unwrap()).collect();
    let batch =
        Batch::new(sequences.iter().zip(&prompts).map(|(s, &p)| Sequence { prompt: &s[..p], completion: &s[p..] }));
    let device = Device::Cpu;

    let forward = policy.forward(&batch, 1.0).unwrap();
    let logprobs = Var::from_tensor(&host(&forward.output())).unwrap();
    let ref_logprobs = host(&reference.logprobs(&batch, 1.0).unwrap());
    let sums = token::span_sums(&logprobs, batch.spans()).unwrap();
    let ref_sums = token::span_sums(&ref_logprobs, batch.spans()).unwrap();
    golden.check("policy_logps", &sums);
    golden.check("ref_logps", &ref_sums);

    let pairs = sequences.len() / 2;
    let half = |t: &Tensor, which: usize| t.narrow(0, which * pairs, pairs).unwrap();
    let tokens: Vec<f32> = batch.spans().windows(2).map(|w| (w[1] - w[0]) as f32).collect();
    let tokens = Tensor::new(tokens, &device).unwrap().to_dtype(dtype).unwrap();
    // The peer's list of losses: DPO, and with a second one the likelihood of all chosen tokens.
    let weight = params["loss_weights"].as_array().unwrap().get(1).and_then(serde_json::Value::as_f64);
    let term = weight.map(|weight| SftTerm { weight, reduction: NllReduction::TokenMean });
    let config = PreferenceConfig { beta: golden.param("beta"), sft: term, ..Default::default() };
    let loss = preference_loss(
        &PreferenceLogprobs {
            policy_chosen: &half(&sums, 0),
            policy_rejected: &half(&sums, 1),
            ref_chosen: &half(&ref_sums, 0),
            ref_rejected: &half(&ref_sums, 1),
            chosen_tokens: &half(&tokens, 0),
            rejected_tokens: &half(&tokens, 1),
            score_gap: None,
        },
        &config,
    )
    .unwrap();
    let mut mean = loss.losses.mean_all().unwrap();
    if let Some(term) = &term {
        let spans = &batch.spans()[..=pairs];
        let whole = BatchTotals { sequences: pairs, tokens: spans[pairs] };
        let chosen = logprobs.narrow(0, 0, spans[pairs]).unwrap();
        mean = (mean + (chosen_nll(&chosen, spans, term, whole).unwrap() * term.weight).unwrap()).unwrap();
    }
    golden.check("loss", &mean);
    golden.check("chosen_rewards", &loss.chosen_rewards);
    golden.check("rejected_rewards", &loss.rejected_rewards);

    let grad = mean.backward().unwrap().remove(&logprobs).unwrap();
    let mut gradients = Gradients::default();
    forward.backward(&grad.to_device(policy.device()).unwrap(), &mut gradients).unwrap();
    let gradients = gradients.complete(&policy).unwrap();
    golden.check_gradients("grads", &gradients, single);

    optimise(golden, policy.variables(), &gradients, single);

    let after = token::span_sums(&policy.logprobs(&batch, 1.0).unwrap(), batch.spans()).unwrap();
    golden.check("policy_logps_after_step", &after);
    check_parameters(golden, &policy.parameters(), single);
}

/// One step of the file's optimiser.
fn optimise(golden: &Golden, variables: &BTreeMap<String, Var>, gradients: &BTreeMap<String, Tensor>, single: bool) {
    let settings = &golden.value["params"]["optimizer"];
    let number = |key: &str| settings[key].as_f64();
    let config = AdamWConfig {
        beta1: settings["betas"][0].as_f64().unwrap(),
        beta2: settings["betas"][1].as_f64().unwrap(),
        eps: number("eps").unwrap(),
        weight_decay: number("weight_decay").unwrap_or(0.0),
        ..Default::default()
    };
    assert_eq!(settings["decay_rule"], "ndim >= 2");
    let norm = global_norm(gradients).unwrap();
    golden.check_numbers("grad_global_norm", &[norm], single);
    let mut optimiser = AdamW::new(variables, config).unwrap();
    let scale = clip_scale(norm, number("max_norm"));
    optimiser.step(variables, gradients, number("lr").unwrap(), scale).unwrap();
}

/// Parameters after the step, where the folder has them.
fn check_parameters(golden: &Golden, got: &BTreeMap<String, Tensor>, single: bool) {
    let file = golden.param_text("params_after_file");
    if file.is_empty() {
        return;
    }
    let atol = golden.value["params"]["params_after_atol"][if single { "f32" } else { "f64" }].as_f64().unwrap();
    let want = safetensors::load(folder().join("tiny-llama").join(file), &Device::Cpu).unwrap();
    assert_eq!(want.len(), got.len());
    for (name, want) in want {
        for (got, want) in flat(&got[&name]).iter().zip(flat(&want)) {
            assert!((got - want).abs() <= atol, "{name}: {got} {want}");
        }
    }
}

#[test]
fn golden_ppo_steps() {
    for name in ["tiny-llama/ppo_step", "tiny-llama/ppo_ptx_step"] {
        let golden = Golden::load(name);
        for dtype in [DType::F32, DType::F64] {
            for machine in machines(dtype) {
                ppo_step(&golden, dtype, machine);
            }
        }
    }
}

fn ppo_step(golden: &Golden, dtype: DType, machine: Machine) {
    let single = dtype == DType::F32;
    let model = |key: &str| machine.run(trainable(golden.param_text(key).trim_start_matches("../"), dtype));
    let policy = machine.run(trainable("tiny-llama", dtype));
    let (reference, critic) = (model("reference"), model("value"));
    let temperature = golden.param("temperature");

    // Responses, without what lies after their end.
    let query = golden.param("query_length") as usize;
    let ids = rows(&golden.value["inputs"]["input_ids"]);
    let attention = rows(&golden.value["inputs"]["attention_mask"]);
    let packing = Packing::new(golden, "response_mask");
    let lengths: Vec<usize> = packing.spans.windows(2).map(|w| w[1] - w[0]).collect();
    let prompts: Vec<Vec<u32>> = ids
        .iter()
        .zip(&attention)
        .map(|(ids, mask)| ids[..query].iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect())
        .collect();
    let responses: Vec<&[u32]> = ids.iter().zip(&lengths).map(|(ids, n)| &ids[query..query + n]).collect();
    let batch = Batch::new(prompts.iter().zip(&responses).map(|(p, r)| Sequence { prompt: p, completion: r }));

    // Before the update: rewards and advantages, from the file's own log-probabilities and values.
    let ref_logprobs = flat(&reference.logprobs(&batch, temperature).unwrap());
    packing.check(golden, "ref_logprobs", &ref_logprobs, single);
    let old = packing.rows(&golden.input("old_logprobs", DType::F64));
    let old_values = packing.rows(&golden.input("old_values", DType::F64));
    let rewards = TokenRewards {
        kl_coef: golden.param("kl_coef"),
        estimator: KlEstimator::K1,
        placement: ScorePlacement::LastToken,
        score_clip: None,
    };
    let scores = flat(&golden.input("scores", DType::F64));
    let (mut all_rewards, mut advantages, mut returns) = (Vec::new(), Vec::new(), Vec::new());
    for (s, w) in packing.spans.windows(2).enumerate() {
        let rewards = rewards.of(scores[s], &old[s], &ref_logprobs[w[0]..w[1]], false);
        let (a, g) = gae(&old_values[s], &rewards, golden.param("gamma"), golden.param("lambda"));
        all_rewards.extend(rewards);
        advantages.extend(a);
        returns.extend(g);
    }
    packing.check(golden, "rewards", &all_rewards, single);
    packing.check(golden, "advantages_raw", &advantages, single);
    packing.check(golden, "returns", &returns, single);
    whiten(&mut advantages, golden.param_text("whiten_advantages") == "unbiased", true);
    packing.check(golden, "advantages", &advantages, single);

    // The update.
    let device = Device::Cpu;
    let tensor = |x: Vec<f64>| Tensor::new(x, &device).unwrap().to_dtype(dtype).unwrap();
    let policy_forward = policy.forward(&batch, temperature).unwrap();
    let n = batch.scored();
    let both = host(&policy.forward(&batch.clone().with_entropy(), temperature).unwrap().output());
    let entropy = both.narrow(0, n, n).unwrap().mean_all().unwrap();
    golden.check("entropy", &entropy);
    let value_forward = critic.forward_values(&batch).unwrap();
    let logprobs = Var::from_tensor(&host(&policy_forward.output())).unwrap();
    let values = Var::from_tensor(&host(&value_forward.output())).unwrap();
    packing.check(golden, "logprobs", &flat(&logprobs), single);
    packing.check(golden, "values", &flat(&values), single);
    let clip = golden.param("clip");
    let tokens = PolicyTokens {
        logprobs: &logprobs,
        old_logprobs: &tensor(old.concat()),
        advantages: &tensor(advantages),
        ref_logprobs: None,
        entropies: None,
        weights: None,
        spans: batch.spans(),
    };
    let config = PolicyLossConfig { clip_low: clip, clip_high: clip, ..Default::default() };
    let actor = policy_loss(&tokens, &config, packing.whole()).unwrap();
    let clip = golden.option("clip_value");
    let value = value_loss(&values, &tensor(old_values.concat()), &tensor(returns), clip, packing.whole()).unwrap();
    golden.check("pg_loss", &actor.loss);
    golden.check("vf_loss", &value.loss);
    let n = packing.whole().tokens as f64;
    golden.check_numbers("clipfrac", &[actor.clipped / n], single);
    golden.check_numbers("approx_kl", &[actor.approx_kl / n], single);
    let mut loss = (&actor.loss + (&value.loss * golden.param("vf_coef")).unwrap()).unwrap();

    let mut gradients = Gradients::default();
    let gamma = golden.param("ptx_coef");
    if gamma != 0.0 {
        let mask = rows(&golden.value["inputs"]["ptx_attention_mask"]);
        let text: Vec<Vec<u32>> = rows(&golden.value["inputs"]["ptx_input_ids"])
            .iter()
            .zip(&mask)
            .map(|(ids, mask)| ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect())
            .collect();
        let batch = Batch::new(text.iter().map(|s| Sequence { prompt: &s[..1], completion: &s[1..] }));
        let forward = policy.forward(&batch, 1.0).unwrap();
        let logprobs = Var::from_tensor(&host(&forward.output())).unwrap();
        let whole = BatchTotals { sequences: text.len(), tokens: batch.scored() };
        let nll = sft::nll(&logprobs, batch.spans(), NllReduction::TokenMean, whole).unwrap();
        golden.check("ptx_loss", &nll);
        let weighted = (nll * gamma).unwrap();
        let grad = weighted.backward().unwrap().remove(&logprobs).unwrap();
        forward.backward(&grad.to_device(policy.device()).unwrap(), &mut gradients).unwrap();
        loss = (loss + weighted).unwrap();
    }
    golden.check("loss", &loss);
    let mut grads = loss.backward().unwrap();
    policy_forward
        .backward(&grads.remove(&logprobs).unwrap().to_device(policy.device()).unwrap(), &mut gradients)
        .unwrap();
    let mut value_gradients = Gradients::default();
    value_forward
        .backward(&grads.remove(&values).unwrap().to_device(policy.device()).unwrap(), &mut value_gradients)
        .unwrap();

    // One optimiser over both, as the peer has it.
    let both = |a: BTreeMap<String, Tensor>, b: BTreeMap<String, Tensor>| -> BTreeMap<String, Tensor> {
        let prefixed = |prefix: &'static str| move |(name, t): (String, Tensor)| (format!("{prefix}.{name}"), t);
        a.into_iter().map(prefixed("policy")).chain(b.into_iter().map(prefixed("value"))).collect()
    };
    let gradients = both(gradients.complete(&policy).unwrap(), value_gradients.complete(&critic).unwrap());
    golden.check_gradients("grads", &gradients, single);
    let variables = policy.variables().iter().map(|(n, v)| (format!("policy.{n}"), v.clone()));
    let variables =
        variables.chain(critic.variables().iter().map(|(n, v)| (format!("value.{n}"), v.clone()))).collect();
    optimise(golden, &variables, &gradients, single);
    packing.check(golden, "logprobs_after_step", &flat(&policy.logprobs(&batch, temperature).unwrap()), single);
    packing.check(golden, "values_after_step", &flat(&critic.values(&batch).unwrap()), single);
    check_parameters(golden, &both(policy.parameters(), critic.parameters()), single);
}
