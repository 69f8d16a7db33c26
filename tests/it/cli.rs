//! The command line as a user meets it.

use crate::support::{job_file, rehearsal, stderr, stdout};

#[test]
fn help_shows_examples_and_exit_codes() {
    let text = stdout(&rehearsal(&["--help"]));
    assert!(text.contains("rehearsal run examples/quickstart.toml") && text.contains("Exit codes"), "{text}");
    assert_eq!(rehearsal(&["rum"]).status.code(), Some(2));
}

#[test]
fn generate_answers_with_a_model_or_a_job() {
    let greedy = |model: &str| {
        let output = rehearsal(&["generate", model, "What does the fox do?", "--temperature", "0"]);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let answer = greedy("embedded");
    assert!(answer.contains("fox"), "{answer}");
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 2, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    assert!(greedy(directory.to_str().unwrap()).contains("fox"));

    let output = rehearsal(&["generate", "/nowhere", "x"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("/nowhere is no model"), "{}", stderr(&output));
}

#[test]
fn run_and_status_say_how_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let more = "\n[evaluation]\nevery_steps = 2\nprompts = 4\n";
    let (file, directory) = job_file(folder.path(), 2, more);
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    let text = stdout(&output);
    for expected in
        ["step     1  loss", "held-out at step 0", "checkpoint of step 2", "before     after", "2 steps done"]
    {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let text = stdout(&rehearsal(&["status", directory.to_str().unwrap()]));
    for expected in ["step 2 of 2, newest checkpoint 2", "online_dpo", "not running", "checkpoint of step      2"] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
    let output = rehearsal(&["status", folder.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn export_wants_to_know_what() {
    let folder = tempfile::tempdir().unwrap();
    let output = rehearsal(&["export", folder.path().to_str().unwrap()]);
    assert!(stderr(&output).contains("--model DIR, --ledger FILE"), "{}", stderr(&output));
}
