use candle_core::{DType, Tensor, Var};
use rehearsal_learn::preference::{RewardDistance, SftTerm, chosen_nll};
use rehearsal_learn::{
    BatchTotals, NllReduction, PreferenceConfig, PreferenceKind, PreferenceLogprobs, PreferenceLoss, preference_loss,
    token,
};

use super::{Golden, Packing, TYPES, flat};

/// The rest of a pair's inputs, beside the policy's own log-probabilities.
struct Inputs {
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    score_gap: Option<Tensor>,
}

impl Inputs {
    fn of(golden: &Golden, dtype: DType) -> Self {
        let input = |key: &str| golden.input(key, dtype);
        let gap = golden.value["inputs"]
            .get("chosen_gt_rewards")
            .map(|_| (input("chosen_gt_rewards") - input("rejected_gt_rewards")).unwrap());
        Self {
            ref_chosen: input("ref_chosen_logps"),
            ref_rejected: input("ref_rejected_logps"),
            chosen_tokens: input("chosen_mask").sum(1).unwrap(),
            rejected_tokens: input("rejected_mask").sum(1).unwrap(),
            score_gap: gap,
        }
    }

    fn loss(&self, chosen: &Tensor, rejected: &Tensor, config: &PreferenceConfig) -> PreferenceLoss {
        let x = PreferenceLogprobs {
            policy_chosen: chosen,
            policy_rejected: rejected,
            ref_chosen: &self.ref_chosen,
            ref_rejected: &self.ref_rejected,
            chosen_tokens: &self.chosen_tokens,
            rejected_tokens: &self.rejected_tokens,
            score_gap: self.score_gap.as_ref(),
        };
        preference_loss(&x, config).unwrap()
    }
}

fn check_rewards(golden: &Golden, loss: &PreferenceLoss) {
    golden.check("chosen_rewards", &loss.chosen_rewards);
    golden.check("rejected_rewards", &loss.rejected_rewards);
    golden.check("margins", &loss.margins().unwrap());
    let margins = flat(&loss.margins().unwrap());
    let accuracy = margins.iter().filter(|&&m| m > 0.0).count() as f64 / margins.len() as f64;
    golden.check_numbers("accuracy", &[accuracy], loss.losses.dtype() == DType::F32);
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
        ("dpo_exo_pair", PreferenceKind::Exo),
        ("dpo_nca_pair", PreferenceKind::Nca),
        ("dpo_sppo_hard", PreferenceKind::SppoHard),
        ("dpo_apo_zero", PreferenceKind::ApoZero),
        ("dpo_apo_down", PreferenceKind::ApoDown),
    ];
    for (name, kind) in files {
        let golden = Golden::load(name);
        let (beta, label_smoothing) = (golden.param("beta"), golden.param("label_smoothing"));
        let config = PreferenceConfig { kind, beta, label_smoothing, sft: None };
        for dtype in TYPES {
            let chosen = Var::from_tensor(&golden.input("policy_chosen_logps", dtype)).unwrap();
            let rejected = Var::from_tensor(&golden.input("policy_rejected_logps", dtype)).unwrap();
            let loss = Inputs::of(&golden, dtype).loss(&chosen, &rejected, &config);
            golden.check("losses", &loss.losses);
            let mean = loss.losses.mean_all().unwrap();
            golden.check("loss", &mean);
            let grads = mean.backward().unwrap();
            golden.check("grad_policy_chosen_logps", grads.get(&chosen).unwrap());
            golden.check("grad_policy_rejected_logps", grads.get(&rejected).unwrap());
            check_rewards(&golden, &loss);
        }
    }
}

/// The deck's weight of a pair's gradient: `σ(r_l - r_w)`.
#[test]
fn golden_dpo_gradient_weights() {
    for name in ["dpo_sigmoid", "dpo_sigmoid_extreme"] {
        let golden = Golden::load(name);
        let numbers = |key: &str| golden.output(key);
        let weights: Vec<f64> = numbers("chosen_rewards")
            .iter()
            .zip(numbers("rejected_rewards"))
            .map(|(w, l)| 1.0 / (1.0 + (w - l).exp()))
            .collect();
        golden.check_numbers("grad_weight", &weights, false);
        let beta = golden.param("beta");
        let chosen = Var::from_tensor(&golden.input("policy_chosen_logps", DType::F64)).unwrap();
        let rejected = golden.input("policy_rejected_logps", DType::F64);
        let loss =
            Inputs::of(&golden, DType::F64).loss(&chosen, &rejected, &PreferenceConfig { beta, ..Default::default() });
        let grads = loss.losses.sum_all().unwrap().backward().unwrap();
        let from_loss: Vec<f64> = flat(grads.get(&chosen).unwrap()).iter().map(|g| -g / beta).collect();
        golden.check_numbers("grad_weight", &from_loss, false);
    }
}

#[test]
fn golden_losses_without_a_reference() {
    let simpo = Golden::load("pref_simpo");
    let hinge = Golden::load("pref_slic_hinge");
    let cases =
        [(&simpo, PreferenceKind::SimPo { gamma: simpo.param("simpo_gamma") }), (&hinge, PreferenceKind::SlicHinge)];
    for (golden, kind) in cases {
        let config = PreferenceConfig { kind, beta: golden.param("beta"), ..Default::default() };
        for dtype in TYPES {
            let chosen = Var::from_tensor(&golden.input("policy_chosen_logps", dtype)).unwrap();
            let rejected = Var::from_tensor(&golden.input("policy_rejected_logps", dtype)).unwrap();
            // The file's log-probabilities are averages already: lengths of 1.
            let one = chosen.ones_like().unwrap();
            let x = PreferenceLogprobs {
                policy_chosen: &chosen,
                policy_rejected: &rejected,
                ref_chosen: &one,
                ref_rejected: &one,
                chosen_tokens: &one,
                rejected_tokens: &one,
                score_gap: None,
            };
            let loss = preference_loss(&x, &config).unwrap();
            golden.check("losses", &loss.losses);
            golden.check("chosen_rewards", &loss.chosen_rewards);
            golden.check("rejected_rewards", &loss.rejected_rewards);
            let mean = loss.losses.mean_all().unwrap();
            golden.check("loss", &mean);
            let grads = mean.backward().unwrap();
            golden.check("grad_policy_chosen_logps", grads.get(&chosen).unwrap());
            golden.check("grad_policy_rejected_logps", grads.get(&rejected).unwrap());
        }
    }
}

#[test]
fn golden_slic() {
    let golden = Golden::load("pref_slic");
    let term = SftTerm { weight: golden.param("lambda"), reduction: NllReduction::SequenceSum };
    let kind = PreferenceKind::Slic { delta: golden.param("delta") };
    let config = PreferenceConfig { kind, sft: Some(term), ..Default::default() };
    for dtype in TYPES {
        let var = |key: &str| Var::from_tensor(&golden.input(key, dtype)).unwrap();
        let (chosen, rejected, sft) =
            (var("policy_chosen_logps"), var("policy_rejected_logps"), var("policy_sft_logps"));
        let one = chosen.ones_like().unwrap();
        let x = PreferenceLogprobs {
            policy_chosen: &chosen,
            policy_rejected: &rejected,
            ref_chosen: &one,
            ref_rejected: &one,
            chosen_tokens: &one,
            rejected_tokens: &one,
            score_gap: None,
        };
        let calibration = preference_loss(&x, &config).unwrap().losses;
        golden.check("losses_cal", &calibration);
        let n = sft.dims1().unwrap();
        let whole = BatchTotals { sequences: n, tokens: n };
        let spans: Vec<usize> = (0..=n).collect();
        let pull = (chosen_nll(&sft, &spans, &term, whole).unwrap() * term.weight).unwrap();
        let loss = (calibration.mean_all().unwrap() + pull).unwrap();
        golden.check("loss", &loss);
        let grads = loss.backward().unwrap();
        for (key, var) in [("grad_chosen", &chosen), ("grad_rejected", &rejected), ("grad_sft", &sft)] {
            golden.check(key, grads.get(var).unwrap());
        }
    }
}

/// A loss on pairs with a pull to the chosen completions, from padded token log-probabilities to their gradients.
fn with_sft(golden: &Golden, config: &PreferenceConfig, part: &str, pull: &str) {
    let term = config.sft.expect("a term");
    for dtype in TYPES {
        let single = dtype == DType::F32;
        let (chosen, rejected) = (Packing::new(golden, "chosen_mask"), Packing::new(golden, "rejected_mask"));
        let packed = |packing: &Packing, key: &str| Var::from_tensor(&packing.pack(&golden.input(key, dtype))).unwrap();
        let tokens_w = packed(&chosen, "policy_chosen_token_logps");
        let tokens_l = packed(&rejected, "policy_rejected_token_logps");
        let sums = |tokens: &Tensor, packing: &Packing| token::span_sums(tokens, &packing.spans).unwrap();
        let loss = Inputs::of(golden, dtype).loss(&sums(&tokens_w, &chosen), &sums(&tokens_l, &rejected), config);
        let mean = loss.losses.mean_all().unwrap();
        golden.check(part, &mean);
        let nll = chosen_nll(&tokens_w, &chosen.spans, &term, chosen.whole()).unwrap();
        golden.check(pull, &nll);
        let total = (mean + (nll * term.weight).unwrap()).unwrap();
        golden.check("loss", &total);
        let grads = total.backward().unwrap();
        let gradient = |var: &Var| flat(grads.get(var).unwrap());
        chosen.check(golden, "grad_policy_chosen_token_logps", &gradient(&tokens_w), single);
        rejected.check(golden, "grad_policy_rejected_token_logps", &gradient(&tokens_l), single);
        if golden.value["outputs"].get("margins").is_some() {
            check_rewards(golden, &loss);
        } else {
            golden.check("losses", &loss.losses);
        }
    }
}

#[test]
fn golden_rpo() {
    for name in ["pref_rpo_token_mean", "pref_rpo_seq_mean"] {
        let golden = Golden::load(name);
        let reduction = match golden.param_text("nll_reduction") {
            "token_mean" => NllReduction::TokenMean,
            _ => NllReduction::SequenceMean,
        };
        let sft = Some(SftTerm { weight: golden.param("alpha"), reduction });
        let config = PreferenceConfig { beta: golden.param("beta"), sft, ..Default::default() };
        with_sft(&golden, &config, "dpo_loss", "nll_loss");
    }
}

#[test]
fn golden_reward_aware_rpo() {
    for name in ["bwd_kl", "bwd_kl_avg", "fwd_kl", "fwd_kl_avg", "sq", "sq_avg"] {
        let golden = Golden::load(&format!("nemotron_rpo_{name}"));
        let distance = match golden.param_text("loss_type") {
            "rpo_bwd_kl" => RewardDistance::BackwardKl,
            "rpo_fwd_kl" => RewardDistance::ForwardKl,
            _ => RewardDistance::Squared,
        };
        let average = golden.value["params"]["average_log_probs"].as_bool().unwrap();
        let reduction = if average { NllReduction::SequenceMean } else { NllReduction::SequenceSum };
        let config = PreferenceConfig {
            kind: PreferenceKind::RewardAware { distance, eta: golden.param("eta"), average },
            beta: golden.param("beta"),
            label_smoothing: 0.0,
            sft: Some(SftTerm { weight: golden.param("sft_loss_weight"), reduction }),
        };
        with_sft(&golden, &config, "preference_loss", "sft_loss");
    }
}
