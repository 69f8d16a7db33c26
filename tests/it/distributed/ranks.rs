//! Members in processes of their own, started by `mpirun`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::kills::Random;
use crate::support::edit::replace_once;
use crate::support::jobs::{LORA, OFFLINE, PPO, RANKINGS, ROLLOUTS, SFT, job};
use crate::support::parts::{Part, skip};
use crate::support::{Remains, number, program, rehearsal, stderr};

/// A program with the feature `mpi`, and a launcher for it.
fn mpi() -> Option<PathBuf> {
    let program = std::env::var_os("REHEARSAL_MPI").map(PathBuf::from).filter(|path| path.exists());
    let launcher = Command::new("mpirun").arg("--version").output().is_ok_and(|o| o.status.success());
    match program {
        Some(program) if launcher => Some(program),
        _ => {
            skip(Part::Mpi, "REHEARSAL_MPI names no program built with `--features mpi`, or there is no `mpirun`");
            None
        }
    }
}

/// A job as `ranks` processes.
fn launch(program: &Path, ranks: usize, arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]).arg(program).args(arguments);
    command
}

fn kinds() -> Vec<(&'static str, &'static str, u64, String)> {
    let bf16 = "[model]\ndtype = \"bf16\"\n";
    vec![
        ("SFT, LoRA", "sft", 8, format!("{SFT}{OFFLINE}{LORA}")),
        ("reward model", "reward_model", 8, format!("{RANKINGS}{OFFLINE}")),
        ("online DPO, bf16", "online_dpo", 6, format!("{ROLLOUTS}{bf16}")),
        ("PPO", "ppo", 6, format!("{ROLLOUTS}{PPO}")),
    ]
}

/// Writes a job in four leaves.
fn in_leaves(folder: &Path, algorithm: &str, steps: u64, more: &str, optimizer: &str) -> (PathBuf, PathBuf) {
    let more = replace_once(more, "[optimizer]\n", &format!("[optimizer]\nleaves = 4\n{optimizer}"));
    job(folder, algorithm, steps, &more)
}

fn alone(algorithm: &str, steps: u64, more: &str) -> Remains {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = in_leaves(folder.path(), algorithm, steps, more, "");
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    Remains::of(&directory)
}

#[test]
fn ranks_end_with_the_bits_of_one_process() {
    let Some(program) = mpi() else { return };
    for (name, algorithm, steps, more) in kinds() {
        let want = alone(algorithm, steps, &more);
        for (ranks, optimizer) in [(2, "shard = true\n"), (4, "")] {
            let folder = tempfile::tempdir().unwrap();
            let (file, directory) = in_leaves(folder.path(), algorithm, steps, &more, optimizer);
            let output = launch(&program, ranks, &["run", file.to_str().unwrap()]).output().unwrap();
            assert!(output.status.success(), "{name}, {ranks} ranks: {}", stderr(&output));
            eprintln!("{name}: {ranks} ranks {optimizer}");
            Remains::of(&directory).assert_same(&want);
        }
    }
}

/// The processes of a launcher.
fn ranks_of(launcher: &Child) -> Vec<u32> {
    let children = format!("/proc/{0}/task/{0}/children", launcher.id());
    let children = std::fs::read_to_string(children).unwrap_or_default();
    children.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

/// Whether a process has ended, though its parent may not have noticed.
fn has_ended(id: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    state.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

/// Waits for a launcher one of whose ranks was killed. Open MPI 4.1.4 at times sleeps for ever when all its processes have ended:
/// then it is ended, as whoever watches it would. Returns whether that was so.
fn end(launcher: &mut Child) -> bool {
    let mut all_ended: Option<Instant> = None;
    while launcher.try_wait().unwrap().is_none() {
        let ended = ranks_of(launcher).into_iter().all(has_ended);
        all_ended = if ended { all_ended.or(Some(Instant::now())) } else { None };
        if all_ended.is_some_and(|since| since.elapsed() > Duration::from_secs(10)) {
            launcher.kill().unwrap();
            launcher.wait().unwrap();
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

#[test]
fn a_killed_rank_ends_the_launch_and_the_resumed_job_ends_the_same() {
    let Some(program) = mpi() else { return };
    let more = format!("{ROLLOUTS}{PPO}");
    let steps = 12;
    let want = alone("ppo", steps, &more);
    let mut random = Random::new(number("REHEARSAL_SEED", 1), 77);
    let wanted = number("REHEARSAL_RANK_KILLS", 5);
    let (mut killed, mut launches, mut stuck) = (0, 0, 0);
    while killed < wanted {
        let folder = tempfile::tempdir().unwrap();
        let (file, directory) = in_leaves(folder.path(), "ppo", steps, &more, "shard = true\n");
        let (file, path) = (file.to_str().unwrap().to_string(), directory.to_str().unwrap().to_string());
        loop {
            // The number of ranks may differ from one launch to the next.
            let ranks = if random.below(2) == 0 { 2 } else { 4 };
            let arguments = if directory.join("job.toml").exists() { ["resume", &path] } else { ["run", &file] };
            let mut command = launch(&program, ranks, &arguments);
            let mut launcher = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let start = Instant::now();
            let after = Duration::from_secs_f64(random.share() * 6.0);
            let status = loop {
                if let Some(status) = launcher.try_wait().unwrap() {
                    break status;
                }
                let victims = ranks_of(&launcher);
                if killed < wanted && start.elapsed() >= after && victims.len() == ranks {
                    let victim = victims[random.below(ranks)];
                    let kill = Command::new("kill").args(["-9", &victim.to_string()]).status().unwrap();
                    stuck += u32::from(end(&mut launcher));
                    let status = launcher.wait().unwrap();
                    if kill.success() && !status.success() {
                        killed += 1;
                    }
                    break status;
                }
                std::thread::sleep(Duration::from_millis(10));
            };
            launches += 1;
            if status.success() {
                break;
            }
        }
        Remains::of(&directory).assert_same(&want);
    }
    println!("{killed} ranks killed in {launches} launches; the launcher did not notice {stuck} times");
}

#[test]
fn processes_that_do_not_divide_the_leaves_are_an_error() {
    let Some(program) = mpi() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = in_leaves(folder.path(), "sft", 4, &format!("{SFT}{OFFLINE}"), "");
    let output = launch(&program, 3, &["run", file.to_str().unwrap()]).output().unwrap();
    let said = stderr(&output);
    assert!(!output.status.success() && said.contains("3 processes do not divide `optimizer.leaves` = 4"), "{said}");
    let _ = directory;
}

#[test]
fn a_build_without_mpi_says_so_to_a_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = in_leaves(folder.path(), "sft", 4, &format!("{SFT}{OFFLINE}"), "");
    if cfg!(feature = "mpi") {
        return;
    }
    let output = program().args(["run", file.to_str().unwrap()]).env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("one of 2 processes") && said.contains("`--features mpi`"), "{said}");
    assert!(!directory.exists());
}
