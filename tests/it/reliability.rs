//! Damage, loss and divergence: what can be made whole again is, to the bit, and what cannot is said.

use std::fs;
use std::path::{Path, PathBuf};

use rehearsal::{CancellationToken, Error, Event, Job};

use crate::support::{Remains, config, job_file, rehearsal, resume, run, runtime, stderr, stdout};

const EVERY: &str = "[checkpoint]\nevery_steps = 2\n";

/// A job of eight steps that was never interrupted.
fn whole() -> Remains {
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), 8, EVERY)).unwrap();
    Remains::of(folder.path())
}

fn remove(directory: &Path, names: &[&str]) {
    for name in names {
        let path = directory.join(name);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
}

/// The file of the newest checkpoint's tensors.
fn newest_shard(directory: &Path) -> PathBuf {
    let shards = fs::read_dir(directory.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path());
    let shards = shards.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    shards.max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap()).unwrap()
}

#[test]
fn a_job_whose_database_is_lost_goes_on_as_if_it_were_there() {
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), 5, EVERY)).unwrap();
    remove(folder.path(), &["store"]);
    let error = run(config(folder.path(), 8, EVERY)).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error}");
    resume(config(folder.path(), 8, EVERY)).unwrap();
    Remains::of(folder.path()).assert_same(&whole());
}

#[test]
fn checkpoints_alone_are_resumed_by_their_own_settings_and_no_others() {
    let lost = ["store", "store.base", "store.journal", "store.sentinel"];
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), 5, EVERY)).unwrap();
    remove(folder.path(), &lost);
    let error = run(config(folder.path(), 8, EVERY)).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error}");
    let mut other = config(folder.path(), 8, EVERY);
    other.common.job.seed = 12;
    let error = resume(other).unwrap_err();
    assert!(matches!(error, Error::Changed { .. }) && error.to_string().contains("job.seed"), "{error}");
    // The ledger is lost; the weights are not.
    remove(folder.path(), &lost);
    let job = Job::builder(config(folder.path(), 8, EVERY));
    let mut events = job.events();
    runtime().block_on(job.build().unwrap().resume(CancellationToken::new())).unwrap();
    let told = std::iter::from_fn(|| events.try_recv().ok());
    let told: Vec<String> = told
        .filter_map(|event| match event {
            Event::Repaired { message } => Some(message),
            _ => None,
        })
        .collect();
    assert!(told.iter().any(|message| message.contains("restored the checkpoint of step 5")), "{told:?}");
    let (remains, whole) = (Remains::of(folder.path()), whole());
    assert!(remains.tensors == whole.tensors && remains.state == whole.state, "the weights differ");
    assert_eq!(remains.ledger, whole.ledger[whole.ledger.len() - remains.ledger.len()..]);

    remove(folder.path(), &lost);
    remove(folder.path(), &["fingerprint.json"]);
    let error = resume(config(folder.path(), 9, EVERY)).unwrap_err();
    assert!(matches!(error, Error::SavedState { .. }), "{error}");
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_end() {
    let folder = tempfile::tempdir().unwrap();
    let (file, directory) = job_file(folder.path(), 5, EVERY);
    assert!(rehearsal(&["run", file.to_str().unwrap()]).status.success());
    let shard = newest_shard(&directory);
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&shard, bytes).unwrap();
    let verified = rehearsal(&["verify", directory.to_str().unwrap()]);
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert_eq!(verified.status.code(), Some(3));
    assert!(stdout(&verified).contains(name), "{}", stdout(&verified));
    // A finished job is resumed to more steps: from step 4, the completions of step 5 being logged still.
    resume(config(&directory, 8, EVERY)).unwrap();
    Remains::of(&directory).assert_same(&whole());
    assert_eq!(rehearsal(&["verify", directory.to_str().unwrap()]).status.code(), Some(0));
}

#[test]
fn a_damaged_line_of_the_history_is_told_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    run(config(folder.path(), 4, EVERY)).unwrap();
    let history = folder.path().join("history.jsonl");
    let mut bytes = fs::read(&history).unwrap();
    bytes[3] = 0xff;
    fs::write(&history, &bytes).unwrap();
    let job = Job::builder(config(folder.path(), 6, EVERY));
    let mut events = job.events();
    runtime().block_on(job.build().unwrap().resume(CancellationToken::new())).unwrap();
    let told = std::iter::from_fn(|| events.try_recv().ok()).any(|event| match event {
        Event::Repaired { message } => message.contains("1 lines of history.jsonl are damaged"),
        _ => false,
    });
    assert!(told);
    assert_eq!(fs::read(folder.path().join("history.damaged.jsonl")).unwrap(), bytes);
    assert_eq!(fs::read_to_string(history).unwrap().lines().count(), 5);
}

#[test]
fn a_job_that_diverges_fails_and_keeps_its_last_good_checkpoint() {
    for more in ["learning_rate = 50.0", "learning_rate = 1e30", "learning_rate = 1e38"] {
        let folder = tempfile::tempdir().unwrap();
        let (file, directory) = job_file(folder.path(), 6, "\n[checkpoint]\nevery_steps = 1\n");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace("learning_rate = 1e-4\nwarmup_steps = 2", more)).unwrap();
        let output = rehearsal(&["run", file.to_str().unwrap()]);
        println!("{more}: {:?} {}", output.status.code(), stderr(&output).lines().last().unwrap_or_default());
        let (store, _) = rehearsal::store::Store::open(&directory).unwrap();
        for checkpoint in store.checkpoints().unwrap() {
            for tensor in store.load_checkpoint(checkpoint.step).unwrap().tensors {
                let (values, _) = tensor.data.as_chunks::<4>();
                let finite = values.iter().all(|b| f32::from_le_bytes(*b).is_finite());
                assert!(finite, "{more}: `{}` of step {}", tensor.name, checkpoint.step);
            }
        }
        if output.status.success() {
            continue; // its numbers are large, and numbers
        }
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(!directory.join("model").exists());
    }
}

#[test]
fn checkpoints_that_keep_to_their_share_of_the_time_change_no_result() {
    let folder = tempfile::tempdir().unwrap();
    let more = "[checkpoint]\nevery_steps = 100\noverhead = 0.5\n";
    run(config(folder.path(), 8, more)).unwrap();
    let remains = Remains::of(folder.path());
    assert!(remains.tensors == whole().tensors, "the weights differ");
}
