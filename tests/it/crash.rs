//! Kills the real program again and again: the end is that of a run that was never interrupted.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rehearsal::lm::random::Stream;

use crate::support::{Remains, job_file, program, rehearsal, stderr};

const STEPS: u64 = 120;
const MORE: &str = "\n[checkpoint]\nevery_steps = 2\n\n[evaluation]\nevery_steps = 40\nprompts = 6\n";
/// Kills that must have hit a running job.
const KILLS: u32 = 22;
/// Steps a process may do before it is killed at the latest, so that a fast machine leaves time for all kills.
const STEPS_AT_MOST: usize = 5;

fn start(args: &[&str]) -> Child {
    program().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Whether the child was still at work when it was killed: after `delay`, or when it has done enough.
fn kill_after(mut child: Child, delay: Duration, history: &Path) -> bool {
    let done = || std::fs::read_to_string(history).map_or(0, |text| text.lines().count());
    let (deadline, before) = (Instant::now() + delay, done());
    while Instant::now() < deadline && done() < before + STEPS_AT_MOST {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap(); // SIGKILL
    child.wait().unwrap();
    true
}

/// Runs a job's file to its end through at most so many kills, and says how many hit a running process.
pub fn killed_run(file: &Path, directory: &Path, kills_at_most: u32, longest_ms: f64) -> u32 {
    let (file, directory_text) = (file.to_str().unwrap(), directory.to_str().unwrap());
    let random = Stream::new(99, 1);
    let mut kills = 0;
    let mut child = start(&["run", file]);
    for attempt in 0..400 {
        // From before the store is open to several steps in, in all phases of a step.
        let delay = Duration::from_millis(15 + (random.uniform(attempt) * longest_ms) as u64);
        if !kill_after(child, delay, &directory.join("history.jsonl")) {
            break;
        }
        kills += 1;
        let known = directory.join("store").is_dir() || directory.join("job.toml").exists();
        let args = if known { ["resume", directory_text] } else { ["run", file] };
        if kills >= kills_at_most {
            break;
        }
        child = start(&args);
    }
    // To the end, whatever the kills left. A job killed before its settings were kept starts again.
    let output = rehearsal(&["resume", directory_text]);
    if !output.status.success() {
        let again = rehearsal(&["run", file]);
        assert!(again.status.success(), "{}\n{}", stderr(&output), stderr(&again));
    }
    kills
}

#[test]
fn a_job_killed_again_and_again_ends_the_same_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    std::fs::create_dir_all(&whole).unwrap();
    std::fs::create_dir_all(&broken).unwrap();
    let (file, directory) = job_file(&whole, STEPS, MORE);
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let want = Remains::of(&directory);
    assert_eq!(want.step, STEPS);
    assert_eq!(want.history.len() as u64, STEPS);
    assert_eq!(want.ledger.len() as u64, 4 * STEPS);

    let (file, directory) = job_file(&broken, STEPS, MORE);
    let kills = killed_run(&file, &directory, 60, 450.0);
    let got = Remains::of(&directory);
    eprintln!("{kills} kills");
    assert!(kills >= KILLS, "only {kills} kills hit a running job");
    got.assert_same(&want);
}

/// Continues the `[optimizer]` section of a test's job.
const BF16: &str = "moments = \"bf16\"\ngradient_checkpointing = true\n[model]\ndtype = \"bf16\"\n";

#[test]
fn a_polite_stop_saves_and_the_resumed_job_ends_the_same() {
    for more in ["", BF16] {
        let folder = tempfile::tempdir().unwrap();
        let (file, directory) = job_file(folder.path(), 12, more);
        let child = start(&["run", file.to_str().unwrap()]);
        while !directory.join("history.jsonl").exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let signal = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        assert!(signal.success());
        let status = { child }.wait().unwrap();
        assert_eq!(status.code(), Some(130));
        let output = rehearsal(&["resume", directory.to_str().unwrap()]);
        assert!(output.status.success(), "{}", stderr(&output));

        let other = tempfile::tempdir().unwrap();
        let (file, whole) = job_file(other.path(), 12, more);
        assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
        let whole = Remains::of(&whole);
        Remains::of(&directory).assert_same(&whole);
        assert!(whole.history.iter().all(|row| row["mismatch_kl"] == 0.0), "sampler and trainer differ");
    }
}
