//! Bad input: the error says what, where and what to do, and nothing is lost.

use std::fs;
use std::path::Path;
use std::process::Command;

use rehearsal::{Config, Error, Job, RewardFn, Sample};

use crate::support::parts::{Part, skip};
use crate::support::watch::{Phase, Watched};
use crate::support::{Remains, config, job_file, program, rehearsal, resume, run, run_with, stderr, toml};

fn problems(source: &str) -> String {
    Config::from_toml(source, Path::new(".")).unwrap_err().to_string()
}

#[test]
fn broken_toml_is_located() {
    let text = problems("[job]\ndirectory = \"x\"\nsteps = = 3\n");
    assert!(text.contains("line 3"), "{text}");
    assert!(text.contains("1 problem"), "{text}");
}

#[test]
fn all_problems_of_a_configuration_are_told_at_once() {
    let text = problems(
        "[job]\nsteps = 0\nseeed = 1\n\n[model]\npolicy = \"/nowhere/model\"\n\n[rollout]\ntemperature = -1\nmin_new_tokens = 90\n\n\
         [reward]\nrules = [\"lenght_window\", \"matches\"]\nweights = [1.0]\n\n[lose]\nbeta = 0.1\n\n[loss]\nkind = \"sigmoyd\"\n\n\
         [placement]\npolicy = \"gpu\"\n",
    );
    for expected in [
        "`job.directory` is missing",
        "line 2: `job.steps` = 0 must be 1 or more",
        "line 3: unknown key `job.seeed`; did you mean `seed`?",
        "line 6: `model.policy` names /nowhere/model, which does not exist",
        "line 9: `rollout.temperature` = -1 must be above 0",
        "line 10: `rollout.min_new_tokens` = 90 exceeds `rollout.max_new_tokens` = 64",
        "line 13: `reward.rules` names `lenght_window`",
        "needs `reward.pattern`",
        "line 14: `reward.weights` has 1 numbers for 2 rules",
        "unknown section `[lose]`; did you mean `loss`?",
        "line 20: `loss.kind` = \"sigmoyd\" must be one of \"sigmoid\"",
        "line 23: `placement.policy` = \"gpu\"",
    ] {
        assert!(text.contains(expected), "no {expected:?} in\n{text}");
    }
}

#[test]
fn a_buffer_too_small_for_a_step_is_told() {
    let text = problems("[job]\ndirectory = \"x\"\n\n[limits]\nrollouts_max = 15\n");
    assert!(text.contains("line 5: `limits.rollouts_max` = 15 is less than the 16 completions of a step"), "{text}");
}

#[test]
fn the_program_exits_with_2_and_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("job.toml");
    fs::write(&file, "[job]\nsteps = \"many\"\n").unwrap();
    let output = rehearsal(&["run", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    let text = stderr(&output);
    assert!(text.contains("job.toml: 2 problems") && text.contains("must be a whole number"), "{text}");
    assert!(!folder.path().join("job").exists());
}

fn run_model(folder: &Path, model: &Path) -> String {
    let job = folder.join("job");
    let more = format!("\n[model]\npolicy = \"{}\"\n", model.display());
    let error = run(config(&job, 1, &more)).unwrap_err().to_string();
    assert!(!job.join("store").exists(), "a job that cannot start leaves nothing behind");
    error
}

/// The embedded model as a Hugging Face directory.
pub fn exported_model(directory: &Path) {
    let model = rehearsal::embedded::model().unwrap();
    model.save(&model.parameters, directory, candle_core::DType::F32).unwrap();
}

#[test]
fn a_wrong_or_truncated_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let text = run_model(folder.path(), &empty);
    assert!(text.contains("is no model") && text.contains("config.json"), "{text}");

    let cut = folder.path().join("cut");
    exported_model(&cut);
    let weights = cut.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1000]).unwrap();
    let text = run_model(folder.path(), &cut);
    assert!(text.contains("model.safetensors"), "{text}");

    let gguf = folder.path().join("broken.gguf");
    fs::write(&gguf, b"GGUF but not really").unwrap();
    let text = run_model(folder.path(), &gguf);
    assert!(text.contains("broken.gguf"), "{text}");
}

fn run_prompts(lines: &str, more: &str) -> Result<rehearsal::Outcome, Error> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    fs::write(&file, lines).unwrap();
    let more = format!("\n[prompts]\ntrain = \"{}\"\n{more}", file.display());
    run(config(&folder.path().join("job"), 1, &more))
}

const GOOD: &str = "{\"prompt\": \"What does the fox do?\"}\n";

#[test]
fn a_broken_line_is_named_or_skipped() {
    for (line, expected) in [
        ("{\"prompt\": \"cut off\n", "line 2: is no JSON"),
        ("{\"question\": \"x\"}\n", "line 2: has no column `prompt`"),
        ("{\"prompt\": 3}\n", "line 2: has a `prompt` that is neither"),
        ("{\"prompt\": \"  \"}\n", "line 2: has an empty prompt"),
        ("{\"prompt\": [{\"role\": \"user\"}]}\n", "line 2: has a message without"),
    ] {
        let lines = format!("{GOOD}{line}");
        let text = run_prompts(&lines, "").unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("on_bad_line"), "{text}");
        run_prompts(&lines, "on_bad_line = \"skip\"\n").unwrap();
    }
}

#[test]
fn no_prompt_or_too_long_a_prompt_is_told() {
    let text = run_prompts("", "").unwrap_err().to_string();
    assert!(text.contains("no prompt can be used"), "{text}");
    let long = format!("{GOOD}{{\"prompt\": \"{}\"}}\n", "fox ".repeat(400));
    let text = run_prompts(&long, "on_long = \"fail\"\n").unwrap_err().to_string();
    assert!(text.contains("line 2") && text.contains("tokens and may have 232"), "{text}");
    run_prompts(&long, "").unwrap();
}

#[test]
fn a_reward_that_errs_or_is_not_a_number_stops_the_job_and_names_the_row() {
    let folder = tempfile::tempdir().unwrap();
    let errs = RewardFn::new("judge", |s: &Sample| if s.row.is_multiple_of(2) { Err("offline") } else { Ok(1.0) });
    let error = run_with(config(&folder.path().join("a"), 3, ""), errs).unwrap_err().to_string();
    assert!(error.contains("`judge` failed on row") && error.contains("offline"), "{error}");
    let nan = RewardFn::new("judge", |_: &Sample| Ok::<_, String>(f64::NAN));
    let error = run_with(config(&folder.path().join("b"), 3, ""), nan).unwrap_err().to_string();
    assert!(error.contains("NaN") && error.contains("finite"), "{error}");
}

#[test]
fn a_job_whose_reward_failed_goes_on_once_it_works_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (broken, whole) = (folder.path().join("broken"), folder.path().join("whole"));
    let score = |s: &Sample| s.completion.len() as f64;
    let calls = std::sync::atomic::AtomicU32::new(0);
    let fails = RewardFn::new("r", move |s: &Sample| {
        let n = calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        if n == 30 { Err("down") } else { Ok(score(s)) }
    });
    run_with(config(&broken, 6, ""), fails).unwrap_err();
    let job =
        Job::builder(config(&broken, 6, "")).reward(RewardFn::new("r", move |s: &Sample| Ok::<_, String>(score(s))));
    crate::support::runtime().block_on(job.build().unwrap().resume(Default::default())).unwrap();
    run_with(config(&whole, 6, ""), RewardFn::new("r", move |s: &Sample| Ok::<_, String>(score(s)))).unwrap();
    Remains::of(&broken).assert_same(&Remains::of(&whole));
}

#[test]
fn a_second_process_on_the_same_directory_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 2000, "");
    // It waits for its log to be read, and so does not end meanwhile.
    let mut first = Watched::start(&["run", file.to_str().unwrap()]);
    first.until(Phase::Stepped);
    let second = rehearsal(&["resume", directory.to_str().unwrap()]);
    let status = rehearsal(&["status", directory.to_str().unwrap()]);
    let process = first.id();
    first.kill();
    assert!(!second.status.success());
    let text = stderr(&second);
    assert!(text.contains(&format!("in use by process {process}")), "{text}");
    let text = crate::support::stdout(&status);
    assert!(text.contains(&format!("running as process {process}")), "{text}");
}

#[test]
fn a_job_is_not_overwritten_and_not_resumed_with_other_settings() {
    let folder = tempfile::tempdir().unwrap();
    let job = folder.path().join("job");
    run(config(&job, 2, "")).unwrap();
    let text = run(config(&job, 2, "")).unwrap_err().to_string();
    assert!(text.contains("holds a job already"), "{text}");
    let text = resume(config(&job, 2, "\n[loss]\nbeta = 0.5\n")).unwrap_err().to_string();
    assert!(text.contains("loss.beta") && text.contains("now:  0.5"), "{text}");
    let text = resume(config(&folder.path().join("other"), 2, "")).unwrap_err().to_string();
    assert!(text.contains("holds no job"), "{text}");
    let prompts = folder.path().join("prompts.jsonl");
    fs::write(&prompts, GOOD).unwrap();
    let text =
        resume(config(&job, 2, &format!("\n[prompts]\ntrain = \"{}\"\n", prompts.display()))).unwrap_err().to_string();
    assert!(text.contains("the prompts") && !text.contains("loss."), "{text}");
    // More steps are no other settings.
    assert_eq!(resume(config(&job, 4, "")).unwrap().step, 4);
}

#[test]
fn a_job_of_relative_paths_is_resumed_from_anywhere() {
    let folder = tempfile::tempdir().unwrap();
    let jobs = folder.path().join("jobs");
    fs::create_dir(&jobs).unwrap();
    fs::write(folder.path().join("prompts.jsonl"), GOOD).unwrap();
    exported_model(&folder.path().join("model"));
    let more = "\n[model]\npolicy = \"../model\"\n\n[prompts]\ntrain = \"../prompts.jsonl\"\n";
    fs::write(jobs.join("job.toml"), toml(Path::new("../out"), 2, more)).unwrap();
    let output = program().current_dir(folder.path()).args(["run", "jobs/job.toml"]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let directory = folder.path().join("out");
    for (from, name) in [(folder.path(), "out"), (Path::new("/"), directory.to_str().unwrap())] {
        for command in ["resume", "status", "verify"] {
            let output = program().current_dir(from).args([command, name]).output().unwrap();
            assert!(output.status.success(), "{command}: {}", stderr(&output));
        }
    }
}

/// A small disk of its own, unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(folder: &Path, size: &str) -> Option<Self> {
        let path = folder.join("disk");
        fs::create_dir(&path).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path).output();
        let ok = mounted.is_ok_and(|o| o.status.success());
        if !ok {
            skip(Part::Mount, "a small disk could not be mounted (that takes root)");
        }
        ok.then_some(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_pauses_the_job_and_it_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(folder.path(), "64m") else { return };
    // Leave room to begin, not to go far: each checkpoint is 5.5 MB.
    let ballast = disk.0.join("ballast");
    let full = fs::write(&ballast, vec![1u8; 54 << 20]);
    full.unwrap();
    let (job, whole) = (disk.0.join("job"), folder.path().join("whole"));
    let more = "\n[checkpoint]\nevery_steps = 1\nkeep = 1\n";
    let outcome = crate::support::runtime().block_on(async {
        let job = Job::builder(config(&job, 6, more)).build().unwrap();
        let mut events = job.events();
        let running = tokio::spawn(job.run(Default::default()));
        let mut waited = 0;
        loop {
            match events.recv().await {
                Ok(rehearsal::Event::DiskFull { message }) => {
                    assert!(message.contains("no space left"), "{message}");
                    waited += 1;
                    if waited == 2 {
                        fs::remove_file(&ballast).unwrap();
                    }
                }
                Ok(rehearsal::Event::Finished(_)) | Err(_) => break,
                Ok(_) => {}
            }
        }
        assert!(waited > 0, "the disk was never full");
        running.await.unwrap()
    });
    assert_eq!(outcome.unwrap().step, 6);
    run(config(&whole, 6, more)).unwrap();
    Remains::of(&job).assert_same(&Remains::of(&whole));
}

#[test]
fn a_damaged_checkpoint_is_found_by_verify() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 2, "");
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let job = directory.to_str().unwrap();
    let output = rehearsal(&["verify", job]);
    assert!(output.status.success(), "{}", stderr(&output));
    // Scratches all over the database are mended; those of a checkpoint's tensors are found, and cannot be.
    let shards = fs::read_dir(directory.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path());
    let shard = shards.into_iter().find(|path| path.extension().is_some_and(|e| e == "safetensors")).unwrap();
    for (file, code) in [(directory.join("store/db"), 0), (shard, 3)] {
        let mut bytes = fs::read(&file).unwrap();
        for at in (bytes.len() / 4..bytes.len() * 3 / 4).step_by(32 << 10) {
            bytes[at..at + 64].fill(0xA5);
        }
        fs::write(&file, bytes).unwrap();
        let output = rehearsal(&["verify", job]);
        let said = crate::support::stdout(&output);
        assert!(!stderr(&output).contains("error"), "{}", stderr(&output));
        // Where the database fails to open it is said that it was made again, and is damage that was found.
        let mended = code == 0 && said.contains("repaired");
        assert!(mended || output.status.code() == Some(code), "{}: {said}", file.display());
        assert!(code == 0 || said.contains("damaged"), "{said}");
    }
}

#[test]
fn toml_of_the_tests_is_itself_valid() {
    Config::from_toml(&toml(Path::new("x"), 1, ""), Path::new(".")).unwrap();
}
