//! Jobs that an older build began and was killed in (`tests/fixtures/README.md`): this build resumes them, and they end
//! with the weights that the older build ended with when it was not interrupted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

use sha2::{Digest, Sha256};

use crate::support::edit::{replace_once, set};
use crate::support::{rehearsal, stderr};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A case's folder, copied to where a test may change it.
struct Case {
    folder: tempfile::TempDir,
    /// Hashes of all weights exported at the end, by path in the job's directory.
    expected: BTreeMap<String, String>,
}

impl Case {
    fn of(name: &str) -> Self {
        let expected = std::fs::read_to_string(fixtures().join("expected.json")).unwrap();
        let mut expected: BTreeMap<String, BTreeMap<String, String>> = serde_json::from_str(&expected).unwrap();
        let case = Self { folder: tempfile::tempdir().unwrap(), expected: expected.remove(name).expect(name) };
        copy(&fixtures().join(name), case.folder.path());
        let base = format!("# base = {}\n", case.folder.path().display());
        for file in case.kept_settings() {
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, replace_once(&text, "# base = .\n", &base)).unwrap();
        }
        case
    }

    fn job(&self) -> PathBuf {
        self.folder.path().join("job")
    }

    /// The copies of the settings that the older build kept in the job's directory and in those of stages.
    fn kept_settings(&self) -> Vec<PathBuf> {
        files(&self.job()).into_iter().filter(|f| f.file_name().is_some_and(|n| n == "job.toml")).collect()
    }

    /// Sets a key in the copies that the job keeps.
    fn set(&self, key: &str, value: impl Into<toml_edit::Value> + Clone) {
        for file in self.kept_settings() {
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, set(&text, key, value.clone())).unwrap();
        }
    }

    fn resume(&self) -> Output {
        rehearsal(&["resume", self.job().to_str().unwrap()])
    }

    /// Resumes with settings in which one key differs from those that the job was started with.
    fn resume_changed(&self, key: &str, value: impl Into<toml_edit::Value>) -> Output {
        let text = std::fs::read_to_string(self.folder.path().join("job.toml")).unwrap();
        let file = self.folder.path().join("changed.toml");
        std::fs::write(&file, set(&text, key, value)).unwrap();
        rehearsal(&["resume", self.job().to_str().unwrap(), "--config", file.to_str().unwrap()])
    }

    fn assert_ends_as_expected(&self, output: &Output) {
        assert!(output.status.success(), "{}", stderr(output));
        let job = self.job();
        let exported = files(&job).into_iter().filter(|f| {
            f.extension().is_some_and(|e| e == "safetensors") && f.components().any(|c| c.as_os_str() == "model")
        });
        let hash = |file: PathBuf| {
            let sum = Sha256::digest(std::fs::read(&file).unwrap());
            let hex = sum.iter().map(|byte| format!("{byte:02x}")).collect();
            (file.strip_prefix(&job).unwrap().to_str().unwrap().to_string(), hex)
        };
        let got: BTreeMap<String, String> = exported.map(hash).collect();
        assert_eq!(got, self.expected, "the weights are not those of the build that began the job");
    }
}

/// All files under a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Copies a folder and unpacks its databases.
fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        if file.extension().is_some_and(|e| e == "zst") {
            let packed = std::fs::File::open(&file).unwrap();
            let mut unpacked = std::fs::File::create(target.with_extension("")).unwrap();
            zstd::stream::copy_decode(packed, &mut unpacked).unwrap();
        } else {
            std::fs::copy(&file, target).unwrap();
        }
    }
}

/// That a resume was refused because a key that changes results differs, and that it shows both values.
#[track_caller]
fn assert_refused(output: &Output, key: &str) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in [key, "then", "now"] {
        assert!(message.contains(part), "no {part:?} in {message}");
    }
}

/// All that holds of a job of an older build.
fn holds(name: &str) {
    // Changed settings are refused before the first resume, which changes nothing, and after it.
    let case = Case::of(name);
    assert_refused(&case.resume_changed("job.seed", 4), "seed");
    assert_refused(&case.resume_changed("optimizer.learning_rate", 0.25), "learning_rate");
    case.assert_ends_as_expected(&case.resume());
    // A finished job is resumed, too: it has nothing left to do.
    case.assert_ends_as_expected(&case.resume());
    case.set("optimizer.learning_rate", 0.25);
    assert_refused(&case.resume(), "learning_rate");

    // What only changes speed, memory or what is watched may differ.
    let case = Case::of(name);
    case.set("rollout.batch", 7);
    case.set("optimizer.micro_batch_tokens", 1 << 16);
    case.set("placement.threads", 1);
    case.set("limits.request_seconds", 1800);
    case.assert_ends_as_expected(&case.resume());
}

/// One test for each case, and one that no case is without a test.
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        mod a_job_of_an_older_build_resumes_to_its_bits {
            $(#[test]
            fn $name() {
                super::holds(stringify!($name));
            })*

            #[test]
            fn and_no_case_is_forgotten() {
                let folders = std::fs::read_dir(super::fixtures()).unwrap().map(|e| e.unwrap().path());
                let folders = folders.filter(|path| path.is_dir());
                let mut found: Vec<String> =
                    folders.map(|path| path.file_name().unwrap().to_str().unwrap().into()).collect();
                let mut named = vec![$(stringify!($name)),*];
                (found.sort(), named.sort_unstable());
                assert_eq!(found, named);
            }
        }
    };
}

cases!(chain, dpo, grpo, iterative_dpo, lora, online_dpo, ppo, reward_model, rso, sft);
