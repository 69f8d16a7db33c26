//! What members, ranks and generation ahead of learning cost and bring: jobs of each kind in turn, as processes of their own; the
//! median over rounds of a step's time against that of the first kind.
//!
//!     cargo bench --bench members                          # the embedded model, in f32
//!     cargo bench --bench members -- MODEL bf16 4 3        # a model's directory or file, 4 steps a job, 3 rounds
//!     cargo bench --bench members -- ahead MODEL f32 4 3   # generation ahead of learning, with answers of 256 tokens
//!
//! Ranks are started by `mpirun` where `REHEARSAL_MPI` names a program built with `--features mpi`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A kind of job.
struct Arm {
    name: &'static str,
    /// Keys of `[optimizer]`, `[rollout]` and `[placement]`.
    optimizer: &'static str,
    rollout: &'static str,
    placement: &'static str,
    /// Processes, if they are started by `mpirun`.
    ranks: Option<usize>,
}

const fn arm(name: &'static str, optimizer: &'static str, rollout: &'static str, placement: &'static str) -> Arm {
    Arm { name, optimizer, rollout, placement, ranks: None }
}

const fn ranks(name: &'static str, optimizer: &'static str, n: usize) -> Arm {
    Arm { name, optimizer, rollout: "", placement: "threads = 1", ranks: Some(n) }
}

const MEMBERS: [Arm; 6] = [
    arm("1 member x 2 threads", "", "", "threads = 2"),
    arm("1 member x 2 threads, 2 leaves", "leaves = 2", "", "threads = 2"),
    arm("2 members x 1 thread", "leaves = 2", "", "threads = 2\npolicy = [\"cpu\", \"cpu\"]"),
    arm("2 members x 1 thread, sharded", "leaves = 2\nshard = true", "", "threads = 2\npolicy = [\"cpu\", \"cpu\"]"),
    ranks("2 ranks x 1 thread", "leaves = 2", 2),
    ranks("2 ranks x 1 thread, sharded", "leaves = 2\nshard = true", 2),
];

const AHEAD: [Arm; 3] = [
    arm("ahead = 0", "", "", "threads = 2"),
    arm("ahead = 1, one thread for each", "", "ahead = 1", "threads = 2\nsampler_threads = 1"),
    arm("ahead = 1, taking turns", "", "ahead = 1", "threads = 2"),
];

/// The times of a job's steps but the first two, and the most memory of each of its processes, in MB.
fn run(arm: &Arm, common: &str, steps: u64, tokens: usize) -> Option<(Vec<f64>, f64)> {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, directory) = (folder.path().join("job.toml"), folder.path().join("job"));
    let text = format!(
        "[job]\ndirectory = \"job\"\nalgorithm = \"online_dpo\"\nsteps = {steps}\nseed = 3\n{common}\
         [rollout]\nprompts_per_step = 4\ncompletions_per_prompt = 2\nmax_new_tokens = {tokens}\nmin_new_tokens = {tokens}\n{}\n\
         [optimizer]\nlearning_rate = 1e-6\n{}\n[placement]\n{}\n[reward]\nrules = [\"distinct_words\"]\n\
         [evaluation]\nevery_steps = 0\n[checkpoint]\nevery_steps = 1000000\n",
        arm.rollout, arm.optimizer, arm.placement
    );
    std::fs::write(&file, text).expect("a file");
    let mut command = match arm.ranks {
        None => Command::new(env!("CARGO_BIN_EXE_rehearsal")),
        Some(ranks) => {
            let program = PathBuf::from(std::env::var_os("REHEARSAL_MPI")?);
            let mut command = Command::new("mpirun");
            command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]).arg(program);
            command
        }
    };
    let status = command.arg("run").arg(&file).stdout(Stdio::null()).status().expect("the program");
    assert!(status.success(), "{} failed", arm.name);
    let history = std::fs::read_to_string(directory.join("history.jsonl")).expect("a history");
    let seconds = |line: &str| -> f64 {
        let row: serde_json::Value = serde_json::from_str(line).expect("a row");
        row["seconds"]["total"].as_f64().expect("seconds")
    };
    Some((history.lines().skip(2).map(seconds).collect(), peak(&directory)))
}

/// The most memory that the process of the job has held.
fn peak(directory: &Path) -> f64 {
    let status = std::fs::read_to_string(directory.join("status.json")).unwrap_or_default();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap_or_default();
    status["memory"]["measured_peak"].as_f64().unwrap_or(0.0) / 1e6
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let ahead = arguments.first().is_some_and(|a| a == "ahead");
    if ahead {
        arguments.remove(0);
    }
    let model = arguments.first().map(|m| format!("policy = \"{m}\"\n")).unwrap_or_default();
    let dtype = arguments.get(1).map_or("f32", String::as_str);
    let steps = arguments.get(2).map_or(12, |n| n.parse().expect("steps"));
    let rounds = arguments.get(3).map_or(5, |n| n.parse().expect("rounds"));
    let common = format!("[model]\n{model}dtype = \"{dtype}\"\n");
    let (arms, tokens): (&[Arm], usize) = if ahead { (&AHEAD, 256) } else { (&MEMBERS, 48) };
    let mut times: Vec<Vec<f64>> = arms.iter().map(|_| Vec::new()).collect();
    let mut memory = vec![0.0f64; arms.len()];
    for _ in 0..rounds {
        for (index, arm) in arms.iter().enumerate() {
            let Some((seconds, peak)) = run(arm, &common, steps + 2, tokens) else { continue };
            times[index].push(median(&seconds));
            memory[index] = memory[index].max(peak);
        }
    }
    println!("| {dtype} | a step, s | against the first | memory of a process, MB |\n| --- | --- | --- | --- |");
    for ((arm, seconds), peak) in arms.iter().zip(&times).zip(memory) {
        if seconds.is_empty() {
            println!("| {} | not run: REHEARSAL_MPI is not set | | |", arm.name);
            continue;
        }
        let ratios: Vec<f64> = seconds.iter().zip(&times[0]).map(|(s, first)| s / first).collect();
        println!("| {} | {:.3} | {:.2} | {peak:.0} |", arm.name, median(seconds), median(&ratios));
    }
}
