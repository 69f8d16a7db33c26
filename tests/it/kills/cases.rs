//! What is killed: every algorithm, adapters, bf16, a chain, a judge behind HTTP, and people.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::judges::{Server, api, longer};
use crate::support::edit::replace_once;
use crate::support::jobs::{self, CHAIN, LORA, OFFLINE, PAIRS, PPO, RANKINGS, ROLLOUTS, SFT};
use crate::support::{free_port, rewarded_by, toml};

/// A kind of job.
pub struct Case {
    pub name: &'static str,
    prepare: Box<dyn Fn(&Path) -> Prepared>,
}

/// A job that can be started.
pub struct Prepared {
    pub file: PathBuf,
    pub directory: PathBuf,
    /// Folders of a chain's stages, in order; empty for a job without.
    pub stages: &'static [&'static str],
}

impl Case {
    fn new(name: &'static str, prepare: impl Fn(&Path) -> Prepared + 'static) -> Self {
        Self { name, prepare: Box::new(prepare) }
    }

    /// Writes a job's files into a folder.
    pub fn prepare(&self, folder: &Path) -> Prepared {
        (self.prepare)(folder)
    }

    fn of(name: &'static str, algorithm: &'static str, steps: u64, more: String) -> Self {
        Self::new(name, move |folder| {
            let (file, directory) = jobs::job(folder, algorithm, steps, &more);
            Prepared { file, directory, stages: &[] }
        })
    }

    /// Online DPO, with other sources of rewards where `rewards` says so.
    fn online(name: &'static str, steps: u64, rewards: Option<String>, more: &'static str) -> Self {
        Self::new(name, move |folder| {
            let (file, directory) = (folder.join("job.toml"), folder.join("job"));
            let mut text = toml(&directory, steps, more);
            if let Some(rewards) = &rewards {
                text = rewarded_by(&text, rewards);
            }
            std::fs::write(&file, jobs::placed(text)).unwrap();
            Prepared { file, directory, stages: &[] }
        })
    }
}

const CHECKPOINTS: &str = "\n[checkpoint]\nevery_steps = 2\n[evaluation]\nevery_steps = 10\nprompts = 4\n";
/// The first line continues the `[optimizer]` section of a test's job.
const BF16: &str = "moments = \"bf16\"\n[model]\ndtype = \"bf16\"\n[checkpoint]\nevery_steps = 3\n";
const GRPO: &str = "[ppo]\nadvantages = \"grpo\"\nkl_loss_coef = 0.02\n";
const ROUNDS: &str = "[update]\nepochs = 2\nminibatches = 2\n";

pub fn all() -> Vec<Case> {
    vec![
        Case::of("SFT", "sft", 40, format!("{SFT}{OFFLINE}")),
        Case::of("SFT, LoRA", "sft", 40, format!("{SFT}{OFFLINE}{LORA}")),
        Case::of("reward model", "reward_model", 40, format!("{RANKINGS}{OFFLINE}")),
        Case::of("DPO", "dpo", 40, format!("{PAIRS}{OFFLINE}")),
        Case::online("online DPO", 40, None, CHECKPOINTS),
        Case::online("online DPO, bf16", 30, None, BF16),
        Case::of("PPO", "ppo", 20, format!("{ROLLOUTS}{PPO}")),
        Case::of("PPO, LoRA", "ppo", 16, format!("{ROLLOUTS}{PPO}{LORA}")),
        Case::of("PPO, two members", "ppo", 16, members(&format!("{ROLLOUTS}{PPO}"))),
        Case::of("PPO, LoRA, two steps ahead", "ppo", 16, ahead(2, &format!("{ROLLOUTS}{PPO}{LORA}"))),
        Case::of("online DPO, a step ahead", "online_dpo", 24, ahead(1, ROLLOUTS)),
        Case::of("GRPO", "ppo", 20, format!("{ROLLOUTS}{GRPO}")),
        Case::of("iterative DPO", "iterative_dpo", 20, format!("{ROLLOUTS}{ROUNDS}")),
        Case::of("RSO", "rso", 20, format!("{ROLLOUTS}{ROUNDS}[rso]\nkeep = 2\n[loss]\nkind = \"hinge\"\n")),
        chain(),
        judge(),
        people(),
    ]
}

/// A job's sections with two members for policy and critic, and four leaves.
fn members(more: &str) -> String {
    let more = replace_once(more, "[optimizer]\n", "[optimizer]\nleaves = 4\n");
    format!("{more}[placement]\npolicy = [\"cpu\", \"cpu\"]\n")
}

/// A job's sections with generation ahead of learning, on a thread of its own.
fn ahead(steps: u64, more: &str) -> String {
    let more = replace_once(more, "[rollout]\n", &format!("[rollout]\nahead = {steps}\n"));
    format!("{more}[placement]\nsampler_threads = 1\n")
}

fn chain() -> Case {
    Case::new("chain of SFT, reward model, PPO", |folder| {
        jobs::data(folder);
        let file = folder.join("chain.toml");
        std::fs::write(&file, jobs::placed(CHAIN.into())).unwrap();
        Prepared { file, directory: folder.join("chain"), stages: &["01-sft", "02-reward_model", "03-ppo"] }
    })
}

fn judge() -> Case {
    let server = Server::start(|_, body| longer(body));
    let sections = api(&server, "");
    Case::online("online DPO, judge behind HTTP", 10, Some(sections), CHECKPOINTS)
}

fn people() -> Case {
    let port = free_port();
    std::thread::spawn(move || labeller(&format!("http://127.0.0.1:{port}")));
    let sections = format!("[people]\nlisten = \"127.0.0.1:{port}\"\n");
    Case::online(
        "online DPO, people",
        5,
        Some(sections),
        "[checkpoint]\nevery_steps = 2\n[evaluation]\nevery_steps = 0\n",
    )
}

/// A person who prefers the longer answer, whenever there is a page to say it on.
fn labeller(url: &str) {
    let item = || -> Option<Value> {
        ureq::get(&format!("{url}/api/next?labeller=anna")).call().ok()?.body_mut().read_json().ok()
    };
    loop {
        let found = item().unwrap_or_default();
        let Some(id) = found["item"]["id"].as_u64() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        // Pairs of a completion's index and its text, in the order in which they are shown; ranks go by index.
        let mut answers: Vec<(u64, &str)> = Vec::new();
        for answer in found["item"]["completions"].as_array().unwrap() {
            answers.push((answer[0].as_u64().unwrap(), answer[1].as_str().unwrap()));
        }
        answers.sort();
        let better = |a: &str, b: &str| (a.len(), a) > (b.len(), b);
        let rank = |answer: &str| 1 + answers.iter().filter(|(_, other)| better(other, answer)).count();
        let ranks: Vec<usize> = answers.iter().map(|(_, answer)| rank(answer)).collect();
        let _ =
            ureq::post(&format!("{url}/api/label")).send_json(json!({"labeller": "anna", "item": id, "ranks": ranks}));
    }
}
