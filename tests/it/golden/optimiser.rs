use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};
use rehearsal_learn::{AdamRule, AdamW, AdamWConfig, Schedule, ScheduleKind, clip_scale, global_norm};
use serde_json::Value;

use super::{Golden, TYPES, flat, numbers, tensor};

fn named(list: &Value, dtype: DType) -> BTreeMap<String, Tensor> {
    list.as_array().unwrap().iter().enumerate().map(|(i, t)| (i.to_string(), tensor(t, dtype))).collect()
}

#[test]
fn golden_adamw() {
    for name in ["adamw", "adamw_wd_clip"] {
        let golden = Golden::load(name);
        let params = &golden.value["params"];
        let config = AdamWConfig {
            beta1: params["betas"][0].as_f64().unwrap(),
            beta2: params["betas"][1].as_f64().unwrap(),
            eps: golden.param("eps"),
            // The files decay the first tensor, a matrix, and not the second, a vector: our rule.
            weight_decay: params["weight_decay"][0].as_f64().unwrap(),
            ..Default::default()
        };
        for dtype in TYPES {
            let single = dtype == DType::F32;
            let variables: BTreeMap<String, Var> = named(&golden.value["inputs"]["params"], dtype)
                .into_iter()
                .map(|(name, t)| (name, Var::from_tensor(&t).unwrap()))
                .collect();
            let mut optimiser = AdamW::new(&variables, config).unwrap();
            let norms = numbers(&golden.value["outputs"]["grad_norms"]);
            for (step, rate) in params["lrs"].as_array().unwrap().iter().enumerate() {
                let gradients = named(&golden.value["inputs"]["grads"][step], dtype);
                let norm = global_norm(&gradients).unwrap();
                golden.check_values("grad_norms", &[norm], &[norms[step]], single);
                optimiser
                    .step(&variables, &gradients, rate.as_f64().unwrap(), clip_scale(norm, params["max_norm"].as_f64()))
                    .unwrap();
                let want = named(&golden.value["outputs"]["params_after_step"][step], DType::F64);
                for (name, var) in &variables {
                    golden.check_values("params_after_step", &flat(var), &flat(&want[name]), single);
                }
            }
            for kind in ["exp_avg", "exp_avg_sq"] {
                for (name, want) in named(&golden.value["outputs"][kind], DType::F64) {
                    let got = &optimiser.state()[&format!("{kind}.{name}")];
                    golden.check_values(kind, &flat(got), &flat(&want), single);
                }
            }
        }
    }
}

#[test]
fn golden_adam_with_epsilon_hat() {
    let golden = Golden::load("adam_tf_style");
    let params = &golden.value["params"];
    let config = AdamWConfig {
        beta1: params["betas"][0].as_f64().unwrap(),
        beta2: params["betas"][1].as_f64().unwrap(),
        eps: golden.param("eps"),
        rule: AdamRule::EpsilonHat,
        ..Default::default()
    };
    for dtype in TYPES {
        let start = Var::from_tensor(&golden.input("param", dtype)).unwrap();
        let variables = BTreeMap::from([("0".to_string(), start)]);
        let mut optimiser = AdamW::new(&variables, config).unwrap();
        let gradients = golden.value["inputs"]["grads"].as_array().unwrap();
        for (step, rate) in params["lrs"].as_array().unwrap().iter().enumerate() {
            let gradient = BTreeMap::from([("0".to_string(), tensor(&gradients[step], dtype))]);
            optimiser.step(&variables, &gradient, rate.as_f64().unwrap(), 1.0).unwrap();
            let want = numbers(&golden.value["outputs"]["param_after_step"][step]);
            golden.check_values("param_after_step", &flat(&variables["0"]), &want, dtype == DType::F32);
        }
    }
}

#[test]
fn golden_learning_rates() {
    for name in ["lr_linear", "lr_cosine", "lr_constant_with_warmup", "lr_cosine_with_min_lr", "lr_instructgpt_warmup"]
    {
        let golden = Golden::load(name);
        let floor = golden.value["params"]["min_lr_rate"].as_f64().unwrap_or(0.0);
        let kind = match golden.param_text("schedule") {
            "linear" => ScheduleKind::Linear,
            "cosine" | "cosine_with_min_lr" => ScheduleKind::Cosine { floor },
            "constant_with_warmup" => ScheduleKind::Constant,
            "constant_warmup_from_tenth" => ScheduleKind::ConstantFromTenth,
            other => panic!("{name}: schedule {other}"),
        };
        let schedule = Schedule {
            kind,
            peak: golden.param("peak_lr"),
            warmup_steps: golden.param("warmup_steps") as u64,
            total_steps: golden.param("total_steps") as u64,
        };
        let rates: Vec<f64> = (0..golden.output("lr").len() as u64).map(|t| schedule.rate(t)).collect();
        golden.check_numbers("lr", &rates, false);
    }
}
