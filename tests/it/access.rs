//! A running job, read by other processes through its socket.

use std::path::Path;

use crate::support::watch::{Phase, Watched};
use crate::support::{Remains, config, job_file, rehearsal, run, stderr, stdout};

/// Runs the command and returns what it printed.
#[track_caller]
fn answered(args: &[&str]) -> String {
    let output = rehearsal(args);
    assert!(output.status.success(), "{args:?}: {}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

/// A folder with a name so long that the path of a socket in it is no address.
fn long(folder: &Path) -> std::path::PathBuf {
    let long = folder.join("a-folder-with-a-long-name-".repeat(8));
    std::fs::create_dir(&long).unwrap();
    long
}

#[test]
fn a_running_job_answers_other_processes_and_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(&long(folder.path()), 8, "");
    let job = directory.to_str().unwrap();
    let mut running = Watched::start(&["run", file.to_str().unwrap()]);
    // The job goes no further than its pipe is read, so it runs while it is asked.
    running.until(Phase::Stepped);
    let status = answered(&["status", job]);
    assert!(status.contains(&format!("running as process {}", running.id())), "{status}");
    assert!(status.contains("of 8, newest checkpoint"), "{status}");
    assert!(!answered(&["generate", job, "What does the fox do?"]).trim().is_empty());
    let pairs = answered(&["export", job, "--ledger", "-"]);
    assert!(pairs.lines().count() > 0, "{pairs}");
    assert!(answered(&["verify", job]).contains(" 0 damaged"));
    // Written between two steps, so the log must be read on.
    let out = folder.path().join("model");
    let exported = std::thread::spawn({
        let args = ["export", job, "--model", out.to_str().unwrap()].map(String::from);
        move || answered(&args.each_ref().map(String::as_str))
    });
    let status = running.end();
    assert!(status.success(), "{status}");
    exported.join().unwrap();
    assert!(out.join("config.json").exists());
    assert!(!directory.join("job.sock").exists(), "the socket is removed with the job");
    let whole = folder.path().join("whole");
    run(config(&whole, 8, "")).unwrap();
    Remains::of(&directory).assert_same(&Remains::of(&whole));
}

#[test]
fn a_socket_that_a_kill_left_is_no_job() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 6, "\n[checkpoint]\nevery_steps = 2\n");
    let job = directory.to_str().unwrap();
    let mut running = Watched::start(&["run", file.to_str().unwrap()]);
    running.until(Phase::Saved);
    running.kill();
    assert!(directory.join("job.sock").exists());
    assert!(answered(&["status", job]).contains("not running"));
    assert!(!answered(&["generate", job, "What does the fox do?"]).trim().is_empty());
    answered(&["resume", job]);
}
