//! Commands around jobs: values in place of a file's, checks, lists, new files, and what a job does by its evaluations.

use std::fs;
use std::path::Path;
use std::process::Output;

use rehearsal::store::Store;
use serde_json::Value;

use crate::support::jobs::{ROLLOUTS, job};
use crate::support::{program, rehearsal, stderr};

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn succeeds(args: &[&str]) -> String {
    let output = rehearsal(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

fn lines(file: &Path) -> Vec<Value> {
    fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn values_take_the_place_of_a_files_and_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (file, _) = job(folder.path(), "online_dpo", 2, ROLLOUTS);
    let (file, other) = (file.to_str().unwrap(), folder.path().join("other"));
    let directory = format!("job.directory={}", other.display());
    let set = ["--set", &directory, "--set", "rollout.prompts_per_step=2", "--set", "loss.kind=ipo"];
    succeeds(&[&["run", file][..], &set].concat());
    assert!(!folder.path().join("job").exists());
    let kept = fs::read_to_string(other.join("job.toml")).unwrap();
    assert!(kept.contains("kind = \"ipo\"") && kept.contains("prompts_per_step = 2"), "{kept}");
    assert_eq!(lines(&other.join("history.jsonl"))[0]["pairs"], 2.0);

    // What changes results is refused by name; more steps are kept.
    let other = other.to_str().unwrap();
    let refused = rehearsal(&["resume", other, "--set", "loss.kind=sigmoid"]);
    let message = stderr(&refused);
    assert!(refused.status.code() == Some(2) && message.contains("loss.kind") && message.contains("ipo"), "{message}");
    succeeds(&["resume", other, "--set", "job.steps=3"]);
    succeeds(&["resume", other]);
    assert_eq!(lines(&Path::new(other).join("history.jsonl")).len(), 3);

    let wrong = rehearsal(&["run", file, "--set", "steps=3", "--set", "los.beta=1"]);
    assert!(stderr(&wrong).contains("`--set steps=3` must be `section.key=value`"), "{}", stderr(&wrong));
    let unknown = rehearsal(&["run", file, "--set", "los.beta=1"]);
    assert!(stderr(&unknown).contains("unknown section `[los]`; did you mean `loss`?"), "{}", stderr(&unknown));
}

#[test]
fn a_check_reads_everything_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job(folder.path(), "online_dpo", 2, ROLLOUTS);
    let file = file.to_str().unwrap();
    let checked = succeeds(&["check", file]);
    for wanted in [
        "online_dpo, 2 steps",
        "0.46 M parameters",
        "memory, predicted",
        "to be created",
        "row 2 as the model reads it",
    ] {
        assert!(checked.contains(wanted), "{wanted} is not in {checked}");
    }
    assert!(!directory.exists());
    let (rows, _) = job(folder.path(), "dpo", 2, "[data]\ntrain = [\"preferences.jsonl\"]\nbatch_size = 4\n");
    let checked = succeeds(&["check", rows.to_str().unwrap()]);
    assert!(checked.contains("Thank you.") && checked.contains("Go away."), "both completions: {checked}");
    let missing = rehearsal(&["check", rows.to_str().unwrap(), "--set", "data.train=[\"absent.jsonl\"]"]);
    assert_eq!(missing.status.code(), Some(2));
    succeeds(&["run", rows.to_str().unwrap()]);
    assert!(succeeds(&["check", rows.to_str().unwrap()]).contains("holds a job; `rehearsal resume` continues it"));
    let watched = succeeds(&["watch", folder.path().join("job").to_str().unwrap()]);
    assert!(watched.contains("dpo: step 2 of 2, done") && watched.contains("margin"), "{watched}");
    let listed = succeeds(&["list", folder.path().to_str().unwrap()]);
    assert!(listed.lines().any(|line| line.starts_with("job ") && line.contains("2 of 2 done")), "{listed}");
}

#[test]
fn a_new_file_is_a_job_and_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    for algorithm in ["online_dpo", "ppo", "iterative_dpo", "rso"] {
        let out = folder.path().join(format!("{algorithm}.toml"));
        let out = out.to_str().unwrap();
        let rules = ["--rules", "distinct_words,ends_properly"];
        succeeds(&[&["init", algorithm, "--out", out, "--directory", "made"][..], &rules].concat());
        assert!(succeeds(&["check", out]).contains(algorithm));
        let again = rehearsal(&[&["init", algorithm, "--out", out][..], &rules].concat());
        assert!(!again.status.success(), "{out} was overwritten");
    }
    let out = folder.path().join("new.toml");
    let unnamed = rehearsal(&["init", "--out", out.to_str().unwrap()]);
    assert!(
        unnamed.status.code() == Some(2) && stderr(&unnamed).contains("name the algorithm"),
        "{}",
        stderr(&unnamed)
    );
    let unknown = rehearsal(&["init", "grpo", "--out", out.to_str().unwrap()]);
    assert!(stderr(&unknown).contains("algorithm") && !out.exists(), "{}", stderr(&unknown));
}

#[test]
fn schema_completions_and_manual_are_whole() {
    let schema: Value = serde_json::from_str(&succeeds(&["schema"])).unwrap();
    assert!(schema["properties"]["view"]["properties"]["listen"].is_object());
    for shell in ["bash", "zsh", "fish"] {
        assert!(succeeds(&["completions", shell]).contains("rehearsal"));
    }
    let folder = tempfile::tempdir().unwrap();
    succeeds(&["man", folder.path().to_str().unwrap()]);
    let page = fs::read_to_string(folder.path().join("rehearsal-run.1")).unwrap();
    assert!(page.contains(".TH") && page.contains("optimizer.learning_rate"), "{page}");
    // The log in JSON: a line of it is an object.
    let output = program().args(["--log-format", "json", "-v", "status", "absent"]).output().unwrap();
    let log = stderr(&output);
    for line in log.lines().filter(|line| line.starts_with('{')) {
        assert!(serde_json::from_str::<Value>(line).is_ok_and(|line| line["level"].is_string()), "{line}");
    }
}

#[test]
fn the_best_model_is_kept_and_patience_ends_a_job() {
    let folder = tempfile::tempdir().unwrap();
    let more = ROLLOUTS.replace("every_steps = 6\nprompts = 6", "every_steps = 2\nprompts = 6\nbest = \"reward\"");
    let (file, directory) = job(folder.path(), "online_dpo", 8, &more);
    let file = file.to_str().unwrap();
    let checkpoints = ["--set", "checkpoint.keep=1", "--set", "checkpoint.keep_every=4"];
    succeeds(&[&["run", file, "--set", "optimizer.learning_rate=2e-3"][..], &checkpoints].concat());
    let kept: Vec<u64> = {
        let (store, _) = Store::open(&directory).unwrap();
        store.checkpoints().unwrap().iter().map(|c| c.step).collect()
    };
    assert_eq!(kept, [4, 8]);
    let evaluations = lines(&directory.join("evaluations.jsonl"));
    let best =
        evaluations.iter().rev().max_by(|a, b| a["reward"].as_f64().unwrap().total_cmp(&b["reward"].as_f64().unwrap()));
    let best = best.unwrap()["step"].as_u64().unwrap();
    // The same job, as long as the best evaluation; after step 0 it is the model as it was.
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    if best > 0 {
        let (steps, other) = (format!("job.steps={best}"), folder.path().join("other"));
        let directory = format!("job.directory={}", other.display());
        succeeds(&["run", file, "--set", "optimizer.learning_rate=2e-3", "--set", &steps, "--set", &directory]);
        assert!(weights(&other.join("model")) == weights(&folder.path().join("job/best")), "of step {best}");
    }

    // No evaluation is better than the first, and the third ends the job.
    let directory = folder.path().join("patient");
    let place = format!("job.directory={}", directory.display());
    let set = ["--set", &place, "--set", "optimizer.learning_rate=1e-12", "--set", "evaluation.patience=2"];
    let said = succeeds(&[&["run", file][..], &set].concat());
    assert!(said.contains("4 steps done"), "{said}");
    let directory = directory.to_str().unwrap();
    assert!(succeeds(&["resume", directory]).contains("4 steps done"));
    assert!(succeeds(&["resume", directory, "--set", "evaluation.patience=0"]).contains("8 steps done"));
    let wrong = rehearsal(&["run", file, "--set", "evaluation.best=none", "--set", "evaluation.patience=2"]);
    assert!(stderr(&wrong).contains("needs `evaluation.best`"), "{}", stderr(&wrong));
}
