//! Small jobs on the embedded model, in the process and as the real program.

pub mod browser;
pub mod edit;
pub mod jobs;
pub mod parts;
pub mod small;
pub mod watch;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rehearsal::algorithms::OnlineDpo;
use rehearsal::driver::RolloutSettings;
use rehearsal::store::{Preference, Store};
use rehearsal::{CancellationToken, Config, Error, Job, Outcome, Reward};

use self::parts::{Part, skip};

/// A Python that has `transformers` and `torch` (`REHEARSAL_PYTHON`, or `python3`).
pub fn python() -> Option<String> {
    python_with(Part::Python, "transformers, torch")
}

/// A Python with some modules, separated by commas.
pub fn python_with(part: Part, modules: &str) -> Option<String> {
    let python = std::env::var("REHEARSAL_PYTHON").unwrap_or_else(|_| "python3".into());
    let import = format!("import {modules}");
    let found = Command::new(&python).args(["-c", &import]).output().is_ok_and(|o| o.status.success());
    if !found {
        skip(part, format_args!("{python} cannot import {modules}; set REHEARSAL_PYTHON to one that can"));
    }
    found.then_some(python)
}

/// The rewards of [`toml`].
pub const RULES: &str = "[reward]\nrules = [\"distinct_words\", \"ends_properly\"]\nweights = [0.1, 1.0]\n";

/// A job's document with other sources of rewards in the place of its rules.
pub fn rewarded_by(text: &str, sections: &str) -> String {
    edit::replace_once(text, RULES, sections)
}

/// A job of a few seconds. `steps` and what `more` says (whole sections) can be chosen.
pub fn toml(directory: &Path, steps: u64, more: &str) -> String {
    format!(
        r#"
[job]
directory = "{}"
steps = {steps}
seed = 11

[rollout]
prompts_per_step = 4
completions_per_prompt = 2
max_new_tokens = 24
temperature = 1.0

{RULES}
[optimizer]
learning_rate = 1e-4
warmup_steps = 2
{more}"#,
        directory.display()
    )
}

pub fn config(directory: &Path, steps: u64, more: &str) -> Config {
    Config::from_toml(&toml(directory, steps, more), Path::new(".")).unwrap_or_else(|e| panic!("{e}"))
}

/// `[rollout]` of an online DPO job.
pub fn rollout(config: &mut Config) -> &mut RolloutSettings {
    &mut config.algorithm_as_mut::<OnlineDpo>().expect("a job of online DPO").online.rollout
}

/// Runs a job in this process to its end.
pub fn run(config: Config) -> Result<Outcome, Error> {
    runtime().block_on(Job::builder(config).build()?.run(CancellationToken::new()))
}

/// Runs a job with a reward of its own.
pub fn run_with(config: Config, reward: impl Reward) -> Result<Outcome, Error> {
    runtime().block_on(Job::builder(config).reward(reward).build()?.run(CancellationToken::new()))
}

pub fn resume(config: Config) -> Result<Outcome, Error> {
    runtime().block_on(Job::builder(config).build()?.resume(CancellationToken::new()))
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().unwrap()
}

/// A number from the environment.
pub fn number(variable: &str, default: u64) -> u64 {
    let value = std::env::var(variable).ok();
    value.map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("{variable} is a number, not {n:?}")))
}

/// How long a test waits before it says what it waited for. No test passes because this is over.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// A port that nobody listens on: not one of those that the system hands out, so that no other program gets it by chance
/// before it is used.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const PORTS: std::ops::Range<u32> = 15_000..30_000;
    let begin = std::process::id() * 64 % PORTS.len() as u32;
    loop {
        let n = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (PORTS.start + (begin + n) % PORTS.len() as u32) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The program itself.
pub fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_rehearsal"))
}

/// An example of this package, which `cargo test` has built.
pub fn example(name: &str) -> Command {
    let path: PathBuf = Path::new(program().get_program()).parent().unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is missing; build it by `cargo build --examples`", path.display());
    Command::new(path)
}

pub fn rehearsal(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes a job's file beside its directory.
pub fn job_file(folder: &Path, steps: u64, more: &str) -> (PathBuf, PathBuf) {
    let (file, directory) = (folder.join("job.toml"), folder.join("job"));
    std::fs::write(&file, toml(&directory, steps, more)).unwrap();
    (file, directory)
}

/// All that a finished job leaves behind, without the times at which it was written.
#[derive(PartialEq)]
pub struct Remains {
    pub step: u64,
    /// Weights, moments and the job's state with its counters, bit for bit.
    pub tensors: Vec<(String, Vec<u8>)>,
    pub models: std::collections::BTreeMap<String, rehearsal::store::ModelCounters>,
    pub state: Vec<u8>,
    pub ledger: Vec<Preference>,
    /// Steps of the history, without durations.
    pub history: Vec<serde_json::Value>,
}

impl Remains {
    pub fn of(directory: &Path) -> Self {
        let (store, _) = Store::open(directory).unwrap();
        let (wrong, _) = store.verify().unwrap();
        assert!(wrong.is_empty(), "{wrong:?}");
        let checkpoint = store.latest_checkpoint().unwrap().0.expect("a checkpoint");
        let timeless = |p: Preference| Preference { time_ms: 0, ..p };
        let history = std::fs::read_to_string(directory.join("history.jsonl")).unwrap();
        let row = |line: &str| {
            let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
            row.as_object_mut().unwrap().remove("seconds");
            row
        };
        Self {
            step: checkpoint.step,
            tensors: checkpoint.tensors.into_iter().map(|t| (t.name, t.data)).collect(),
            models: checkpoint.models,
            state: checkpoint.state,
            ledger: store.preferences().unwrap().map(|p| timeless(p.unwrap())).collect(),
            history: history.lines().map(row).collect(),
        }
    }

    /// Says what differs first.
    pub fn assert_same(&self, other: &Self) {
        assert_eq!(self.step, other.step);
        for ((name, a), (_, b)) in self.tensors.iter().zip(&other.tensors) {
            assert!(a == b, "`{name}` differs");
        }
        assert_eq!(self.tensors.len(), other.tensors.len());
        for (a, b) in self.ledger.iter().zip(&other.ledger) {
            assert_eq!(a, b);
        }
        assert_eq!(self.ledger.len(), other.ledger.len());
        for (a, b) in self.history.iter().zip(&other.history) {
            assert_eq!(a, b);
        }
        assert_eq!(self.history.len(), other.history.len());
        assert_eq!(self.models, other.models);
        assert!(self.state == other.state, "the job's state differs");
    }
}
