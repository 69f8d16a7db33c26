//! Every algorithm on the embedded model: it learns, and it survives being killed.

use std::path::Path;
use std::time::Duration;

use rehearsal::{Chain, Config, Evaluation, Outcome, RewardFn, Sample};

use crate::support::edit::replace_once;
use crate::support::jobs::{CHAIN, LORA, OFFLINE, PAIRS, PPO, RANKINGS, ROLLOUTS, SFT, data, job};
use crate::support::watch::{Kill, Phase, Victim, spread};
use crate::support::{Remains, rehearsal, run, run_with, runtime, stderr};

fn config(folder: &Path, algorithm: &str, steps: u64, more: &str) -> Config {
    Config::load(&job(folder, algorithm, steps, more).0).unwrap_or_else(|e| panic!("{e}"))
}

fn outcome(algorithm: &str, steps: u64, more: &str) -> (tempfile::TempDir, Outcome) {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(config(folder.path(), algorithm, steps, more)).unwrap();
    (folder, outcome)
}

fn ends(outcome: &Outcome, name: &str) -> (f64, f64) {
    let stat = |e: &Evaluation| e.stat(name).unwrap_or_else(|| panic!("no {name} in {e:?}"));
    (stat(&outcome.evaluations[0]), stat(outcome.evaluations.last().unwrap()))
}

/// Runs a job once without and once with kills; the remains are the same to the bit.
fn survives(algorithm: &str, steps: u64, more: &str) {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (file, directory) = job(whole.path(), algorithm, steps, more);
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let want = Remains::of(&directory);
    assert_eq!((want.step, want.history.len() as u64), (steps, steps));
    let (file, directory) = job(broken.path(), algorithm, steps, more);
    let offline = ["sft", "reward_model", "dpo"].contains(&algorithm);
    let phases: &[Phase] = if offline { &Phase::OF_DATA } else { &Phase::OF_ROLLOUTS };
    Victim { file: &file, directory: &directory, stages: &[] }.survives(&spread(0, steps, 6, phases));
    Remains::of(&directory).assert_same(&want);
}

#[test]
fn sft_lowers_the_held_out_loss() {
    let (_folder, outcome) = outcome("sft", 24, &format!("{SFT}{OFFLINE}"));
    let (before, after) = ends(&outcome, "loss");
    assert!(after < 0.6 * before, "{before} -> {after}");
}

#[test]
fn sft_killed_ends_the_same() {
    survives("sft", 40, &format!("{SFT}{OFFLINE}"));
}

#[test]
fn a_reward_model_learns_the_order_and_is_normalised() {
    let (folder, outcome) = outcome("reward_model", 40, &format!("{RANKINGS}{OFFLINE}"));
    let (_, accuracy) = ends(&outcome, "accuracy");
    assert!(accuracy > 0.95, "{accuracy}");
    let config = std::fs::read_to_string(folder.path().join("job/model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert!(config["architectures"][0].as_str().unwrap().ends_with("ForSequenceClassification"), "{config}");
    assert!(config["reward_normalisation"]["mean"].as_f64().unwrap().abs() > 0.0, "{config}");
}

#[test]
fn a_reward_model_killed_ends_the_same() {
    survives("reward_model", 40, &format!("{RANKINGS}{OFFLINE}"));
}

#[test]
fn dpo_prefers_the_chosen_and_rpo_keeps_them_likely() {
    let dpo = outcome("dpo", 24, &format!("{PAIRS}{OFFLINE}[loss]\nbeta = 0.1\n")).1;
    let rpo = outcome("dpo", 24, &format!("{PAIRS}{OFFLINE}[loss]\nbeta = 0.1\nsft_weight = 1.0\n")).1;
    for outcome in [&dpo, &rpo] {
        assert!(ends(outcome, "accuracy").1 > 0.9, "{:?}", outcome.evaluations);
    }
    let (before, with_dpo) = ends(&dpo, "chosen_logprob");
    let (_, with_rpo) = ends(&rpo, "chosen_logprob");
    assert!(with_rpo > before && with_rpo > with_dpo + 1.0, "{before}: DPO {with_dpo}, RPO {with_rpo}");
}

#[test]
fn every_preference_loss_runs_and_orders_pairs() {
    let kinds = [
        "robust",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "ipo_sum",
        "exo",
        "nca",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "simpo",
        "slic_hinge",
        "slic",
    ];
    for kind in kinds {
        let beta = match kind {
            "ipo" | "ipo_sum" | "sppo_hard" => 0.5,
            "slic_hinge" => 0.01, // without a reference the pairs begin with a margin of their own
            _ => 1.0,
        };
        let loss = format!("[loss]\nkind = \"{kind}\"\nbeta = {beta}\nlabel_smoothing = 0.05\ndelta = 100.0\n");
        let outcome = outcome("dpo", 16, &format!("{PAIRS}{OFFLINE}{loss}")).1;
        let (before, after) = ends(&outcome, "margin");
        assert!(after > before, "{kind}: {before} -> {after}");
    }
}

#[test]
fn reward_aware_losses_need_scores_and_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let more = format!("{PAIRS}{OFFLINE}[loss]\nkind = \"reward_bwd_kl\"\n");
    let error = run(config(folder.path(), "dpo", 2, &more)).unwrap_err().to_string();
    assert!(error.contains("score_chosen"), "{error}");
}

#[test]
fn dpo_killed_ends_the_same() {
    survives("dpo", 40, &format!("{PAIRS}{OFFLINE}"));
}

#[test]
fn ppo_killed_in_all_its_phases_ends_the_same() {
    survives("ppo", 24, &format!("{ROLLOUTS}{PPO}"));
}

#[test]
fn rloo_and_grpo_killed_end_the_same() {
    survives(
        "ppo",
        16,
        &format!("{ROLLOUTS}[ppo]\nadvantages = \"grpo\"\naggregation = \"sequence_mean\"\nkl_loss_coef = 0.02\n"),
    );
    survives("ppo", 16, &format!("{ROLLOUTS}[ppo]\nadvantages = \"rloo\"\nratio = \"sequence_sum\"\n"));
}

#[test]
fn rounds_killed_end_the_same() {
    let update = "[update]\nepochs = 2\nminibatches = 2\n";
    survives("iterative_dpo", 16, &format!("{ROLLOUTS}{update}"));
    survives("rso", 16, &format!("{ROLLOUTS}{update}[rso]\nkeep = 2\n[loss]\nkind = \"hinge\"\n"));
}

/// Rewards courtesy, which the embedded model shows now and then.
fn courteous() -> RewardFn<impl Fn(&Sample) -> Result<f64, String>> {
    RewardFn::new("courteous", |s: &Sample| {
        let text = s.completion.to_lowercase();
        let words = ["thank you", "glad", "lovely", "pleasure", "please", "hope"];
        Ok::<_, String>(f64::from(words.iter().any(|w| text.contains(w))))
    })
}

#[test]
fn policy_gradients_and_rounds_raise_the_reward() {
    let rollouts = [
        ("prompts_per_step = 4", "prompts_per_step = 8"),
        ("max_new_tokens = 16", "max_new_tokens = 24"),
        ("1e-4", "5e-4"),
        ("every_steps = 6\nprompts = 6", "every_steps = 100\nprompts = 24"),
    ]
    .iter()
    .fold(ROLLOUTS.to_string(), |text, (from, to)| replace_once(&text, from, to));
    for (algorithm, more) in [
        ("ppo", "[update]\nepochs = 2\n[ppo]\nkl_coef = 0.01\n"),
        ("ppo", "[ppo]\nadvantages = \"rloo\"\nkl_coef = 0.01\n"),
        ("ppo", "[ppo]\nadvantages = \"grpo\"\nkl_coef = 0.01\n"),
        ("iterative_dpo", "[update]\nepochs = 2\n"),
        ("rso", "[update]\nepochs = 2\n[rso]\nkeep = 4\nbeta = 0.3\n"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path(), algorithm, 24, &format!("{rollouts}{more}"));
        let outcome = run_with(config, courteous()).unwrap();
        let (before, after) = ends(&outcome, "reward");
        assert!(after > before + 0.1, "{algorithm} {more}: {before} -> {after}");
    }
}

#[test]
fn sampling_filters_do_not_leak_into_the_update() {
    let filtered = replace_once(ROLLOUTS, "temperature = 1.0", "temperature = 0.8\ntop_p = 0.6\ntop_k = 20");
    let (folder, _) = outcome("ppo", 4, &filtered);
    let history = std::fs::read_to_string(folder.path().join("job/history.jsonl")).unwrap();
    for line in history.lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        // The trainer's log-probabilities are of the unfiltered distribution, and so are the sampler's: the same bits.
        assert_eq!(row["mismatch_kl"], 0.0, "{line}");
        // One pass over fresh rollouts: nothing has moved yet.
        assert!((row["ratio"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{line}");
    }
}

#[test]
fn a_step_ends_early_once_the_policy_has_moved_far_enough() {
    let minibatches = |stop_kl: &str| -> Vec<f64> {
        let update = format!("[update]\nepochs = 6\nminibatches = 2\n[ppo]\n{stop_kl}\n");
        let (folder, _) = outcome("ppo", 3, &format!("{ROLLOUTS}{update}"));
        let history = std::fs::read_to_string(folder.path().join("job/history.jsonl")).unwrap();
        let row =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["minibatches"].as_f64().unwrap();
        history.lines().map(row).collect()
    };
    assert_eq!(minibatches(""), [12.0; 3]);
    // The first minibatch sees the policy that sampled; the second one sees a policy that has moved.
    assert_eq!(minibatches("stop_kl = 1e-12"), [2.0; 3]);
}

#[test]
fn accumulated_micro_batches_are_the_large_batch() {
    let remains = |micro: u64| {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path(), "sft", 3, &format!("{SFT}{OFFLINE}"));
        config.common.optimizer.micro_batch_tokens = micro as usize;
        run(config).unwrap();
        Remains::of(&folder.path().join("job"))
    };
    let (whole, parts) = (remains(1 << 20), remains(1));
    for ((name, a), (_, b)) in whole.tensors.iter().zip(&parts.tensors).filter(|((n, _), _)| n.contains(".weights.")) {
        let floats =
            |bytes: &[u8]| -> Vec<f32> { bytes.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect() };
        for (a, b) in floats(a).iter().zip(floats(b)) {
            assert!((a - b).abs() < 2e-4, "{name}: {a} {b}");
        }
    }
}

#[test]
fn a_chain_killed_in_any_stage_ends_the_same() {
    let stages = ["01-sft", "02-reward_model", "03-ppo"];
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let write = |folder: &Path| {
        data(folder);
        let file = folder.join("chain.toml");
        std::fs::write(&file, CHAIN).unwrap();
        file
    };
    let output = rehearsal(&["run", write(whole.path()).to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    // In every stage: at work, once its last checkpoint is durable and its model is exported, and between two stages.
    let file = write(broken.path());
    let at = |stage, phase, step| Kill { stage, phase, step, delay: Duration::ZERO };
    let mut kills = spread(0, 8, 4, &Phase::OF_DATA);
    kills.extend([at(0, Phase::Saved, 8), at(1, Phase::Started, 0)]);
    kills.extend(spread(1, 10, 4, &Phase::OF_DATA));
    kills.push(at(1, Phase::Finished, 10));
    kills.extend(spread(2, 8, 6, &Phase::OF_ROLLOUTS));
    Victim { file: &file, directory: &broken.path().join("chain"), stages: &stages }.survives(&kills);
    for stage in stages {
        let remains = |folder: &Path| Remains::of(&folder.join("chain").join(stage));
        remains(broken.path()).assert_same(&remains(whole.path()));
        let model =
            |folder: &Path| std::fs::read(folder.join("chain").join(stage).join("model/model.safetensors")).unwrap();
        assert!(model(broken.path()) == model(whole.path()), "the model of {stage} differs");
    }
    let status = rehearsal(&["status", whole.path().join("chain/02-reward_model").to_str().unwrap()]);
    assert!(status.status.success(), "{}", stderr(&status));
    // A finished chain has nothing left to do, which is no error: it may have been killed after its last word.
    let again = rehearsal(&["resume", whole.path().join("chain").to_str().unwrap()]);
    assert!(again.status.success(), "{}", stderr(&again));
}

#[test]
fn a_chain_is_checked_whole_before_it_starts() {
    let wrong = replace_once(CHAIN, "algorithm = \"reward_model\"", "algorithm = \"reward_modell\"");
    let error = Chain::from_toml(&wrong, Path::new("/nowhere")).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("did you mean `reward_model`?"), "{error}");
    assert!(error.contains("/nowhere/demonstrations.jsonl"), "{error}");
    let wrong = replace_once(CHAIN, "[stage.rollout]", "[stage.model]\nreference = \"stage:sftt\"\n[stage.rollout]");
    let error = Chain::from_toml(&wrong, Path::new("/nowhere")).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("the stage `sftt`"), "{error}");
}

/// A job on rows that are written here.
fn on_rows(algorithm: &str, rows: &str, more: &str) -> Result<Outcome, String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    let more = format!("[data]\ntrain = [\"rows.jsonl\"]\n{more}");
    let (file, _) = job(folder.path(), algorithm, 1, &more);
    let config = Config::load(&file).map_err(|e| e.to_string())?;
    run(config).map_err(|e| e.to_string())
}

#[test]
fn rows_that_cannot_be_used_are_named() {
    let good = r#"{"prompt": "Who?", "chosen": "The dog.", "rejected": "The cat."}"#;
    for (algorithm, row, wanted) in [
        ("dpo", r#"{"prompt": "Who?", "chosen": "a"}"#, "has no column `rejected`"),
        ("dpo", r#"{"prompt": "Who?", "chosen": "a", "rejected": "a"}"#, "the same text"),
        ("dpo", r#"{"prompt": "Who?", "chosen": " ", "rejected": "a"}"#, "an empty completion"),
        ("dpo", r#"{"chosen": "b", "rejected": "a"}"#, "has no column `prompt`"),
        ("sft", r#"{"prompt": "Who?"}"#, "has no column `completion`"),
        ("sft", r#"{"messages": "Who?"}"#, "a list of messages"),
        ("reward_model", r#"{"prompt": "W", "completions": ["a", "b"], "ranks": [2, 2]}"#, "in which all tie"),
        ("reward_model", r#"{"prompt": "W", "completions": ["a", "b"], "ranks": [2]}"#, "1 ranks"),
        ("reward_model", r#"{"prompt": "W", "chosen": "a", "rejected": "b", "probability": 1.5}"#, "from 0 to 1"),
        ("reward_model", "nonsense", "is no JSON"),
    ] {
        let error = on_rows(algorithm, &format!("{row}\n"), "").unwrap_err();
        assert!(error.contains(wanted) && error.contains("line 1"), "{algorithm} {row}: {error}");
        assert!(error.contains("on_bad_row"), "{error}");
    }
    // Left out and counted, where that is asked for.
    let rows = format!("{good}\n{{\"prompt\": \"Who?\"}}\n{good}\n");
    on_rows("dpo", &rows, "on_bad_row = \"skip\"\n").unwrap();
    let error = on_rows("dpo", "{}\n{}\n", "on_bad_row = \"skip\"\n").unwrap_err();
    assert!(error.contains("no row can be used") && error.contains("2 has no column"), "{error}");
    let error =
        on_rows("sft", &format!("{{\"text\": \"{}\"}}\n", "dog ".repeat(4000)), "on_long = \"fail\"\n").unwrap_err();
    assert!(error.contains("tokens and may have"), "{error}");
}

#[test]
fn conversations_are_learned_turn_by_turn() {
    let row = r#"{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The dog."}, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It runs."}]}"#;
    on_rows("sft", row, "").unwrap();
    let both = r#"{"chosen": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The dog."}], "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]}"#;
    on_rows("dpo", both, "").unwrap();
}

#[test]
fn a_loss_that_is_no_number_stops_the_job_and_keeps_what_came_before() {
    let folder = tempfile::tempdir().unwrap();
    let more =
        format!("{SFT}{}", replace_once(&replace_once(OFFLINE, "5e-4", "1e36"), "every_steps = 3", "every_steps = 1"));
    let config = config(folder.path(), "sft", 30, &more);
    let error = run(config).unwrap_err().to_string();
    assert!(error.contains("offending-batch-") && error.contains("nothing was changed"), "{error}");
    let directory = folder.path().join("job");
    let written = std::fs::read_dir(&directory).unwrap().filter_map(|f| f.ok());
    let batch = written.map(|f| f.path()).find(|p| p.to_string_lossy().contains("offending-batch-")).unwrap();
    assert!(std::fs::read_to_string(batch).unwrap().contains("Demonstrations"));
    assert!(Remains::of(&directory).step > 0, "the last good checkpoint is gone");
}

#[test]
fn settings_out_of_range_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let problems =
        |algorithm: &str, more: &str| Config::load(&job(folder.path(), algorithm, 1, more).0).unwrap_err().to_string();
    for (algorithm, more, wanted) in [
        ("dpo", "[data]\ntrain = [\"preferences.jsonl\"]\n[loss]\nbeta = -1.0\n", "`loss.beta`"),
        ("dpo", "[data]\ntrain = [\"preferences.jsonl\"]\n[loss]\nsft_weight = -0.1\n", "`loss.sft_weight`"),
        ("dpo", "[data]\ntrain = [\"preferences.jsonl\"]\n[loss]\nkind = \"exo\"\n", "above 0 for `exo`"),
        ("dpo", "", "`data.train` is missing"),
        ("ppo", "[ppo]\nadvantages = \"rloo\"\n", "need 2 or more"),
        ("ppo", "[ppo]\nlambda = 1.5\n", "`ppo.lambda`"),
        ("ppo", "[ppo]\ndual_clip = 0.5\n", "`ppo.dual_clip`"),
        ("rso", "[rso]\nkeep = 5\n[rollout]\ncompletions_per_prompt = 4\n", "exceeds `rollout.completions_per_prompt`"),
    ] {
        let found = problems(algorithm, more);
        assert!(found.contains(wanted), "{wanted:?} is not in {found}");
    }
}

#[test]
fn a_language_model_is_no_reward_model() {
    let folder = tempfile::tempdir().unwrap();
    let more = replace_once(ROLLOUTS, "rules = [", "models = [\"embedded\"]\nrules = [");
    let error = run(config(folder.path(), "ppo", 1, &more)).unwrap_err().to_string();
    assert!(error.contains("no `score` head") && error.contains("reward_model"), "{error}");
}

#[test]
fn a_library_runs_a_chain() {
    let folder = tempfile::tempdir().unwrap();
    data(folder.path());
    let chain = Chain::from_toml(CHAIN, folder.path()).unwrap();
    assert_eq!(chain.stages().len(), 3);
    let mut jobs = 0;
    let outcome = runtime().block_on(chain.run(false, Default::default(), &mut |_| jobs += 1)).unwrap();
    assert_eq!((outcome.step, jobs), (8, 3));
}

#[test]
fn adapters_learn_leave_the_base_alone_and_survive_kills() {
    let more = format!("{SFT}{}{LORA}", replace_once(OFFLINE, "5e-4", "5e-3"));
    let (folder, outcome) = outcome("sft", 24, &more);
    let (before, after) = ends(&outcome, "loss");
    assert!(after < 0.6 * before, "{before} -> {after}");
    let remains = Remains::of(&folder.path().join("job"));
    assert!(remains.tensors.iter().all(|(name, _)| name.contains(".lora_")), "more than adapters is saved");
    // The exported model is the merged one, and the adapters lie beside it in PEFT's format.
    let model = folder.path().join("job/model");
    assert!(model.join("adapter/adapter_model.safetensors").exists());
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(model.join("adapter/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["peft_type"], &config["r"]), (&"LORA".into(), &4.into()));
    survives("sft", 30, &more);
}

#[test]
fn a_critic_and_a_policy_of_adapters_survive_kills() {
    survives("ppo", 16, &format!("{ROLLOUTS}{PPO}{LORA}"));
}

#[test]
fn adapters_go_on_from_adapters() {
    let more = format!("{SFT}{}{LORA}", replace_once(&replace_once(OFFLINE, "5e-4", "5e-3"), "ema_decay = 0.5\n", ""));
    let (folder, first) = outcome("sft", 16, &more);
    let adapter = folder.path().join("job/model/adapter");
    let more = format!("{SFT}{OFFLINE}[lora]\nadapter = \"{}\"\n", adapter.display());
    let (_next, second) = outcome("sft", 2, &more);
    assert_eq!(ends(&first, "loss").1, ends(&second, "loss").0, "the second job begins where the first one ended");
    // The reference of DPO is the policy as it starts, with the adapter: at first no answer is preferred.
    let pairs = replace_once(OFFLINE, "every_steps = 8", "every_steps = 0");
    let (third, _) = outcome("dpo", 2, &format!("{PAIRS}{pairs}[lora]\nadapter = \"{}\"\n", adapter.display()));
    let history = std::fs::read_to_string(third.path().join("job/history.jsonl")).unwrap();
    let row: serde_json::Value = serde_json::from_str(history.lines().next().unwrap()).unwrap();
    assert!((row["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-5, "{row}");
}
