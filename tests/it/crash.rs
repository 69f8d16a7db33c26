//! Kills the real program again and again: the end is that of a run that was never interrupted.

use std::time::Duration;

use crate::support::watch::{Phase, Victim, Watched, spread};
use crate::support::{Remains, job_file, rehearsal, stderr};

const STEPS: u64 = 60;
const MORE: &str = "\n[checkpoint]\nevery_steps = 2\n\n[evaluation]\nevery_steps = 20\nprompts = 6\n";

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
    let victim = Victim { file: &file, directory: &directory, stages: &[] };
    // Before there is anything to resume, and while it is made: wherever these times are.
    for milliseconds in [0, 1, 2, 4, 8, 16, 32, 64] {
        victim.killed_after(Duration::from_millis(milliseconds));
    }
    victim.survives(&spread(0, STEPS, 30, &Phase::OF_ROLLOUTS));
    Remains::of(&directory).assert_same(&want);
}

/// Continues the `[optimizer]` section of a test's job.
const BF16: &str = "moments = \"bf16\"\ngradient_checkpointing = true\n[model]\ndtype = \"bf16\"\n";

#[test]
fn a_polite_stop_saves_and_the_resumed_job_ends_the_same() {
    for more in ["", BF16] {
        let folder = tempfile::tempdir().unwrap();
        let (file, directory) = job_file(folder.path(), 12, more);
        let mut job = Watched::start(&["run", file.to_str().unwrap()]);
        job.until(Phase::Stepped);
        let signal = std::process::Command::new("kill").args(["-TERM", &job.id().to_string()]).status().unwrap();
        assert!(signal.success());
        assert_eq!(job.end().code(), Some(130));
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
