//! What generation ahead of learning costs in reward, and what its corrections give back: PPO and online DPO on the embedded
//! model, each kind with several seeds; mean reward of a step's completions in each quarter of the job, with 95 % intervals.
//!
//!     cargo bench --bench ahead                # 10 seeds of 80 steps
//!     cargo bench --bench ahead -- 3 40        # 3 seeds of 40 steps

use std::path::Path;

use rehearsal::{CancellationToken, Config, Job};

/// Kinds of jobs: a name, the algorithm, η, and the sections of the algorithm.
const KINDS: [(&str, &str, u64, &str); 9] = [
    ("online DPO, η = 0", "online_dpo", 0, ""),
    ("online DPO, η = 1", "online_dpo", 1, ""),
    ("online DPO, η = 4", "online_dpo", 4, ""),
    ("PPO, η = 0", "ppo", 0, ""),
    ("PPO, η = 1", "ppo", 1, ""),
    ("PPO, η = 4", "ppo", 4, ""),
    ("PPO, η = 4, decoupled", "ppo", 4, "off_policy = \"decoupled\"\n"),
    ("PPO, η = 1, uncorrected", "ppo", 1, "off_policy = \"uncorrected\"\n"),
    ("PPO, η = 4, uncorrected", "ppo", 4, "off_policy = \"uncorrected\"\n"),
];

/// Mean reward of the completions of each step.
fn rewards(algorithm: &str, eta: u64, more: &str, seed: u64, steps: u64) -> Vec<f64> {
    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("job");
    let own = match algorithm {
        "ppo" => format!("[ppo]\nadvantages = \"rloo\"\nkl_coef = 0.02\n{more}[update]\nminibatches = 2\n"),
        _ => "[loss]\nbeta = 0.1\n".into(),
    };
    let text = format!(
        "[job]\ndirectory = \"{}\"\nalgorithm = \"{algorithm}\"\nsteps = {steps}\nseed = {seed}\n\
         [rollout]\nprompts_per_step = 8\ncompletions_per_prompt = 4\nmax_new_tokens = 32\nahead = {eta}\n{own}\
         [reward]\nrules = [\"matches\", \"length_window\"]\nweights = [1.0, 0.5]\nwords_min = 6\nwords_max = 24\n\
         pattern = \"(?i)thank you|glad|lovely|pleasure|please|hope this helps|good day\"\n\
         [optimizer]\nlearning_rate = 2e-4\n\
         [evaluation]\nevery_steps = 0\n[checkpoint]\nevery_steps = 1000000\n",
        directory.display()
    );
    let config = Config::from_toml(&text, Path::new(".")).unwrap_or_else(|e| panic!("{e}"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let job = Job::builder(config).build().expect("a job");
    runtime.block_on(job.run(CancellationToken::new())).unwrap_or_else(|e| panic!("{e}"));
    let history = std::fs::read_to_string(directory.join("history.jsonl")).expect("a history");
    let reward = |line: &str| -> f64 {
        let row: serde_json::Value = serde_json::from_str(line).expect("a row");
        row["reward"].as_f64().expect("a reward")
    };
    history.lines().map(reward).collect()
}

/// Mean and half of the 95 % interval, by Student's t.
fn interval(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let t = [12.7, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26][(values.len().max(2) - 2).min(8)];
    (mean, t * (variance / n).sqrt())
}

fn main() {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let (seeds, steps) = (numbers.first().copied().unwrap_or(10), numbers.get(1).copied().unwrap_or(80));
    println!(
        "| {seeds} seeds, {steps} steps | first quarter | second | third | last |\n| --- | --- | --- | --- | --- |"
    );
    for (name, algorithm, eta, more) in KINDS {
        let all: Vec<Vec<f64>> = (1..=seeds).map(|seed| rewards(algorithm, eta, more, seed, steps)).collect();
        let quarter = |q: usize| {
            let of = |rewards: &Vec<f64>| {
                let part = &rewards[q * rewards.len() / 4..(q + 1) * rewards.len() / 4];
                part.iter().sum::<f64>() / part.len() as f64
            };
            let (mean, half) = interval(&all.iter().map(of).collect::<Vec<_>>());
            format!("{mean:.3} ± {half:.3}")
        };
        println!("| {name} | {} | {} | {} | {} |", quarter(0), quarter(1), quarter(2), quarter(3));
    }
}
