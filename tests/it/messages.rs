//! What the command says of wrong input: it exits with 2, says what to do, and writes no directory.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use rehearsal::{Config, Event, Job};
use serde_json::Value;

use crate::support::edit::replace_once;
use crate::support::{RULES, free_port, job_file, program, rehearsal, runtime, stderr, stdout, toml};

/// Runs a document in a folder; its job would work in `job` there.
fn run_in(folder: &Path, document: &str) -> (Option<i32>, String) {
    let file = folder.join("job.toml");
    fs::write(&file, document).unwrap();
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    (output.status.code(), stderr(&output))
}

/// A job of two steps with other or more sections.
fn job(folder: &Path, sections: &str) -> String {
    format!("[job]\ndirectory = \"{}\"\nsteps = 2\n{sections}", folder.join("job").display())
}

#[track_caller]
fn refused(folder: &Path, document: &str, wanted: &[&str]) {
    let (code, text) = run_in(folder, document);
    for wanted in wanted {
        assert!(text.contains(wanted), "no {wanted:?} in\n{text}");
    }
    assert_eq!(code, Some(2), "{text}");
    assert!(text.lines().count() <= 3, "{text}");
    assert!(!folder.join("job").exists(), "a directory was written before the input was known to be good: {text}");
}

#[test]
fn the_fields_other_words_are_understood() {
    let folder = tempfile::tempdir().unwrap();
    for (sections, wanted) in [
        ("[optimizer]\nlr = 1e-4\n", "unknown key `optimizer.lr`; here it is `optimizer.learning_rate`"),
        ("[rollout]\nmax_tokens = 9\n", "here it is `rollout.max_new_tokens`"),
        ("[data]\nmax_length = 9\n", "here it is `data.tokens_max` for rows"),
        ("algorithm = \"grpo\"\n", "here it is `ppo` with `ppo.advantages = \"grpo\"`"),
        ("[rollout]\ntemprature = 1\n", "did you mean `temperature`?"),
    ] {
        refused(folder.path(), &job(folder.path(), sections), &[wanted]);
    }
}

#[test]
fn files_that_cannot_be_read_are_wrong_input() {
    let folder = tempfile::tempdir().unwrap();
    let output = rehearsal(&["run", "/nowhere/job.toml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let file = folder.path().join("latin.toml");
    fs::write(&file, b"[job]\n# caf\xe9\n").unwrap();
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    assert!(output.status.code() == Some(2) && stderr(&output).contains("UTF-8"), "{}", stderr(&output));
    let name = "[model]\npolicy = \"HuggingFaceTB/SmolLM2-135M\"\n";
    refused(folder.path(), &job(folder.path(), name), &["does not exist", "hf download OWNER/NAME --local-dir DIR"]);
    let cuda = format!("[placement]\npolicy = \"cuda:77\"\n{RULES}");
    refused(folder.path(), &job(folder.path(), &cuda), &["placement `cuda:77`"]);
    fs::write(folder.path().join("file"), "").unwrap();
    let inside = "[job]\ndirectory = \"file/job\"\nsteps = 2\n".to_string() + RULES;
    refused(folder.path(), &inside, &["file/job"]);
}

#[test]
fn tables_and_arrays_of_rows_get_the_command_that_converts_them() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text, wanted) in [
        ("rows.csv", "prompt,completion\na,b\n", "csv.DictReader"),
        ("rows.json", "[{\"prompt\": \"a\", \"completion\": \"b\"}]", "jq -c '.[]'"),
        ("pretty.json", "\n [\n  {\"prompt\": \"a\"}\n]\n", "jq -c '.[]'"),
        ("rows.jsonl", "{\"question\": \"a\", \"reply\": \"b\"}\n", "line 1"),
    ] {
        fs::write(folder.path().join(name), text).unwrap();
        let document = job(folder.path(), &format!("algorithm = \"sft\"\n[data]\ntrain = [\"{name}\"]\n"));
        refused(folder.path(), &document, &[name, wanted]);
    }
}

#[test]
fn damaged_models_say_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 1, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let model = |name: &str| {
        let copy = folder.path().join(name);
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(directory.join("model")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
        copy
    };
    let cut = model("cut").join("model.safetensors");
    let bytes = fs::read(&cut).unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let foreign = model("foreign").join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&foreign).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.values_mut().for_each(|id| *id = (id.as_u64().unwrap() + 100_000).into());
    fs::write(&foreign, tokenizer.to_string()).unwrap();
    fs::remove_dir_all(&directory).unwrap();
    for (name, wanted) in [("cut", "truncated: "), ("foreign", "outside the vocabulary")] {
        let document = job(folder.path(), &format!("[model]\npolicy = \"{name}\"\n{RULES}"));
        refused(folder.path(), &document, &[wanted]);
    }
}

#[test]
fn a_busy_port_is_told_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    for section in ["metrics", "people"] {
        let document = job(folder.path(), &format!("{RULES}[{section}]\nlisten = \"127.0.0.1:{port}\"\n"));
        let (code, text) = run_in(folder.path(), &document);
        assert!(text.contains(&format!("set `{section}.listen` to a free port")), "{text}");
        assert_eq!(code, Some(1), "the input is right, and the system in the way: {text}");
        assert!(!folder.path().join("job").exists(), "{text}");
    }
}

#[test]
fn a_section_that_the_algorithm_does_not_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let document = job(folder.path(), &format!("{RULES}\n[ppo]\nkl_coef = 0.1\n"));
    let line = 1 + document.lines().position(|line| line == "[ppo]").unwrap();
    let (code, text) = run_in(folder.path(), &document);
    assert_eq!(code, Some(0), "{text}");
    let wanted = format!("warning: line {line}: `[ppo]` has no effect: the algorithm `online_dpo` does not read it");
    assert!(text.contains(&wanted), "{text}");
    // Sections that only some stages read are for those.
    let stages = "[job]\ndirectory = \"x\"\n[ppo]\nkl_coef = 0.1\n[reward_model]\n[reward]\nrules = [\"distinct_words\"]\n\
                  [[stage]]\nalgorithm = \"online_dpo\"\n[[stage]]\nalgorithm = \"ppo\"\n";
    let stages = Config::stages(stages, folder.path()).unwrap();
    let warnings: Vec<String> = stages.iter().flat_map(Config::warnings).collect();
    assert!(matches!(warnings.as_slice(), [only] if only.contains("`[reward_model]`")), "{warnings:?}");
}

#[test]
fn more_steps_are_remembered_by_the_next_resume() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 2, "");
    let (path, job) = (file.to_str().unwrap(), directory.to_str().unwrap());
    assert!(rehearsal(&["run", path]).status.success());
    let longer = toml(&directory, 4, "");
    fs::write(&file, longer).unwrap();
    assert!(stdout(&rehearsal(&["resume", job, "--config", path])).contains("4 steps done"));
    assert!(stdout(&rehearsal(&["resume", job])).contains("from step 4 to 4"));
    // What is refused is not remembered.
    fs::write(&file, replace_once(&toml(&directory, 6, ""), "seed = 11", "seed = 12")).unwrap();
    let output = rehearsal(&["resume", job, "--config", path]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("job.seed\n    then: 11\n    now:  12"), "{text}");
    // From Rust too.
    let mut config = Config::load(&directory.join("job.toml")).unwrap();
    assert_eq!(config.common.job.steps, 4);
    config.common.job.steps = 5;
    runtime().block_on(async {
        Job::builder(config).resume().await.unwrap().wait().await.unwrap();
        let job = Job::saved(&directory).unwrap();
        let mut events = job.events();
        job.resume().await.unwrap().wait().await.unwrap();
        let steps = std::iter::from_fn(|| events.try_recv().ok()).find_map(|event| match event {
            Event::Started { steps, .. } => Some(steps),
            _ => None,
        });
        assert_eq!(steps, Some(5));
    });
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 3, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let job = directory.to_str().unwrap();
    for args in [&["status", job][..], &["export", job, "--ledger", "-"], &["resume", job]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = program().args(args).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {:?} {}", output.status, stderr(&output));
        assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    }
}
