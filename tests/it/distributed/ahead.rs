//! Generation ahead of learning: the schedule alone says which version samples, and nothing that happens changes it.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::{Device, Tensor};
use rehearsal::lm::generate::{Completion, Generator, Options, Request, Sampling};
use rehearsal::store::{LoadedCheckpoint, RolloutRecord, Store};
use rehearsal::{Config, Event, Job, Judged, Reward, RewardError, Sample};

use crate::support::edit::replace_once;
use crate::support::jobs::{LORA, PPO, ROLLOUTS, job};
use crate::support::{Remains, number, resume, run, run_with, runtime};

/// Sections with generation `ahead` steps ahead, and of placement what `placement` says.
fn with(more: &str, ahead: u64, placement: &str) -> String {
    let more = replace_once(more, "[rollout]\n", &format!("[rollout]\nahead = {ahead}\n"));
    format!("{more}[placement]\n{placement}\n")
}

fn config(folder: &Path, algorithm: &str, steps: u64, more: &str) -> Config {
    Config::load(&job(folder, algorithm, steps, more).0).unwrap_or_else(|e| panic!("{e}"))
}

fn remains(algorithm: &str, steps: u64, more: &str) -> Remains {
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), algorithm, steps, more)).unwrap();
    Remains::of(&folder.path().join("job"))
}

/// Samples what the log has of a step with the weights of a checkpoint, or with those of the start.
fn sample(weights: Option<&LoadedCheckpoint>, logged: &[RolloutRecord], prompts: &[Vec<u32>]) -> Vec<Completion> {
    let mut model = rehearsal::embedded::model().unwrap();
    for tensor in weights.iter().flat_map(|w| &w.tensors) {
        if let Some(name) = tensor.name.strip_prefix("policy.weights.") {
            let floats: Vec<f32> =
                tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let values = Tensor::from_vec(floats, tensor.shape.as_slice(), &Device::Cpu).unwrap();
            assert!(model.parameters.insert(name.into(), values).is_some(), "{name}");
        }
    }
    let options = Options {
        sampling: Sampling { temperature: 1.0, ..Sampling::default() },
        max_new_tokens: 16,
        min_new_tokens: 0,
        eos: model.architecture.eos.clone(),
        stop: Vec::new(),
        seed: 3,
        batch: 64,
    };
    let decoder = model.frozen(&Device::Cpu, candle_core::DType::F32).unwrap();
    let request = |r: &RolloutRecord| Request { id: r.id, prompt: prompts[r.index as usize / 4].clone().into() };
    let mut all = Vec::new();
    let requests = logged.iter().map(request).collect();
    Generator::new(&decoder).unwrap().generate(requests, &options, None, &|| false, &mut |c| all.push(c)).unwrap();
    all.sort_by_key(|c| c.id);
    all
}

#[test]
fn a_step_learns_from_what_the_policy_before_step_s_minus_eta_samples() {
    let folder = tempfile::tempdir().unwrap();
    let more = replace_once(ROLLOUTS, "every_steps = 2", "every_steps = 1\nkeep = 100");
    let (steps, eta) = (6, 2);
    run(config(folder.path(), "online_dpo", steps, &with(&more, eta, "threads = 2"))).unwrap();
    let directory = folder.path().join("job");
    let history = Remains::of(&directory).history;
    let (store, _) = Store::open(&directory).unwrap();
    let model = rehearsal::embedded::model().unwrap();
    // The log keeps the steps from the first checkpoint on.
    for step in 1..steps {
        let logged = store.rollouts(step).unwrap();
        assert_eq!(logged.len(), 16, "step {step}");
        let by = step.saturating_sub(eta);
        // The prompts as the job encodes them: those of the ledger, in the order of the step.
        let ledger: Vec<_> = store.preferences().unwrap().map(|p| p.unwrap()).filter(|p| p.step == step).collect();
        let prompt = |p: &rehearsal::store::Preference| match &p.prompt {
            rehearsal::store::Prompt::Text(text) => {
                let message = rehearsal::lm::Message { role: "user".into(), content: text.clone() };
                let chat = model.text.encode_chat(&[message]);
                chat.unwrap_or_else(|_| model.text.encode(text).unwrap())
            }
            other => panic!("{other:?}"),
        };
        let prompts: Vec<Vec<u32>> = ledger.iter().map(prompt).collect();
        let weights = (by > 0).then(|| store.load_checkpoint(by).unwrap());
        let sampled = sample(weights.as_ref(), &logged, &prompts);
        for (record, sampled) in logged.iter().zip(&sampled) {
            assert_eq!((record.id, &record.tokens), (sampled.id, &sampled.tokens), "step {step}");
            assert_eq!(record.logprobs, sampled.logprobs, "step {step}");
        }
        let version = |step: u64| if step == 0 { 0 } else { history[step as usize - 1]["version"].as_u64().unwrap() };
        assert!(logged.iter().all(|r| r.policy_version == version(by)), "step {step}");
        assert!(ledger.iter().all(|p| p.policy_version == version(by)), "step {step}");
        let staleness = history[step as usize]["staleness"].as_f64().unwrap();
        assert_eq!(staleness as u64, version(step) - version(by), "step {step}");
    }
}

#[test]
fn threads_devices_and_members_change_no_bit() {
    for (algorithm, more, eta) in [
        ("online_dpo", ROLLOUTS.to_string(), 1),
        ("ppo", format!("{ROLLOUTS}{PPO}{LORA}"), 2),
        ("ppo", format!("{ROLLOUTS}[model]\ndtype = \"bf16\"\n[ppo]\nadvantages = \"grpo\"\n"), 1),
        ("iterative_dpo", ROLLOUTS.to_string(), 1),
    ] {
        let more = replace_once(&more, "[optimizer]\n", "[optimizer]\nleaves = 2\n");
        let of = |placement: &str| remains(algorithm, 8, &with(&more, eta, placement));
        let want = of("threads = 1");
        assert!(want.history.iter().any(|row| row["staleness"].as_f64().unwrap() > 0.0), "{algorithm}");
        for placement in
            ["sampler_threads = 1", "sampler_threads = 2", "policy = [\"cpu\", \"cpu\"]\nsampler_threads = 1"]
        {
            eprintln!("{algorithm}: {placement}");
            of(placement).assert_same(&want);
        }
    }
}

#[test]
fn a_job_that_is_stopped_and_resumed_at_any_step_ends_the_same() {
    let more = with(&format!("{ROLLOUTS}{PPO}"), 2, "sampler_threads = 1");
    let want = remains("ppo", 9, &more);
    for stop in 0..5u64 {
        let folder = tempfile::tempdir().unwrap();
        let of = || config(folder.path(), "ppo", 9, &more);
        runtime().block_on(async {
            let job = Job::builder(of()).start().await.unwrap();
            let mut events = job.events();
            let mut steps = 0;
            while let Ok(event) = events.recv().await {
                steps += u64::from(matches!(event, Event::Step(_)));
                // After some steps, or in the middle of the next one's completions.
                if steps > stop || steps == stop && stop % 2 == 0 && matches!(event, Event::Rollout { .. }) {
                    job.stop();
                    break;
                }
            }
            assert!(job.wait().await.unwrap().stopped);
        });
        resume(of()).unwrap();
        Remains::of(&folder.path().join("job")).assert_same(&want);
    }
}

/// Scores by length, and dies once.
struct Mortal {
    calls: AtomicU32,
    dies_in: u32,
}

impl Reward for Mortal {
    fn name(&self) -> &str {
        "mortal"
    }

    fn score(&self, samples: &[Sample]) -> Result<Vec<Judged>, RewardError> {
        assert!(self.calls.fetch_add(1, Ordering::SeqCst) + 1 != self.dies_in, "the scorer fell over");
        Ok(samples.iter().map(|s| Judged::from((s.completion.len() % 7) as f64)).collect())
    }
}

#[test]
fn the_death_of_a_role_changes_no_bit() {
    let more = ROLLOUTS.split_once("[reward]").unwrap();
    let more = format!("{}[evaluation]{}", more.0, more.1.split_once("[evaluation]").unwrap().1);
    let more = with(&more, 1, "sampler_threads = 1");
    let of = |dies_in| {
        let folder = tempfile::tempdir().unwrap();
        let reward = Mortal { calls: AtomicU32::new(0), dies_in };
        run_with(config(folder.path(), "online_dpo", 8, &more), reward).unwrap();
        Remains::of(&folder.path().join("job"))
    };
    let want = of(u32::MAX);
    for dies_in in [1, 2, 5, number("REHEARSAL_DIES_IN", 8) as u32] {
        of(dies_in).assert_same(&want);
    }
}

#[test]
fn corrections_for_age_are_other_objectives_and_agree_where_nothing_is_old() {
    let of = |ahead, ppo: &str| {
        let more = format!("{ROLLOUTS}[ppo]\nadvantages = \"rloo\"\n{ppo}\n[update]\nminibatches = 2\n");
        remains("ppo", 6, &with(&more, ahead, "threads = 2"))
    };
    let weights = |remains: &Remains| remains.tensors.clone();
    let plain = of(0, "");
    assert!(weights(&of(0, "off_policy = \"decoupled\"")) == weights(&plain), "weights of 1 change nothing");
    assert!(weights(&of(0, "off_policy = \"uncorrected\"")) == weights(&plain));
    assert!(plain.history.iter().all(|row| row["staleness"].is_null()));
    let (sampler, decoupled) = (of(2, ""), of(2, "off_policy = \"decoupled\""));
    let uncorrected = of(2, "off_policy = \"uncorrected\"");
    assert!(weights(&sampler) != weights(&decoupled) && weights(&decoupled) != weights(&uncorrected));
    let last = decoupled.history.last().unwrap();
    assert_eq!(last["staleness"].as_f64(), Some(4.0), "{last}");
    let weight = last["importance_weight"].as_f64().unwrap();
    assert!((weight - 1.0).abs() < 0.2 && weight != 1.0, "{last}");
    assert!(last["importance_weight_max"].as_f64().unwrap() <= 2.0, "{last}");
}
