//! Algorithms of a program's own: resumed to the bit after kills, stops between two updates, and deaths of roles.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rehearsal::actors::{Demonstrations, MaskedSequence, Objective, Pass};
use rehearsal::algorithms::OfflineSettings;
use rehearsal::data::Rows;
use rehearsal::learn::NllReduction;
use rehearsal::lm::Checkpoint;
use rehearsal::{
    Algorithm, AlgorithmSettings, Algorithms, BoxFuture, CancellationToken, Common, Config, Evaluation, Event, Job,
    Keys, LoadedAlgorithm, Loader, Outcome, Result, Run, Seconds, Settings, Starter, Stats, Step, Updates,
};

use crate::support::{Remains, rehearsal, runtime, stderr, stdout};

/// What goes wrong at a step, once.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Trouble {
    #[default]
    None,
    /// The job is asked to stop between two updates.
    Stop,
    /// The policy panics in the second update.
    Panic,
}

/// Two updates a step on demonstrations.
#[derive(Debug, Clone, Default)]
struct Twice {
    offline: OfflineSettings,
    /// The trouble, its step, and how often it has come.
    trouble: (Trouble, u64, Arc<AtomicU32>),
}

impl Settings for Twice {
    fn visit(&mut self, keys: &mut Keys) {
        self.offline.visit(keys);
    }
}

impl AlgorithmSettings for Twice {
    fn check(&self, _: &Common, keys: &mut Keys) {
        self.offline.check(keys, "twice");
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let OfflineSettings { data, prompts } = &self.offline;
        let rows = loader.rows(data, prompts, |reader| reader.demonstrations())?;
        Ok(Box::new(Loaded { settings: self.clone(), policy: loader.policy(), rows }))
    }
}

struct Loaded {
    settings: Twice,
    policy: Arc<Checkpoint>,
    rows: Rows<MaskedSequence>,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            starter.policy(self.policy).await?;
            Ok(Box::new(Running { settings: self.settings, rows: self.rows }) as _)
        })
    }
}

struct Running {
    settings: Twice,
    rows: Rows<MaskedSequence>,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(async move {
            let drawn = self.settings.offline.draw(run, &self.rows);
            let sequences: Vec<MaskedSequence> = drawn.into_iter().map(|(_, row)| row.clone()).collect();
            let demonstrations = Demonstrations { sequences, reduction: NllReduction::TokenMean };
            let mut updates = Updates::default();
            updates.add(run.learn(demonstrations.clone(), run.learning_rate(), 1.0).await?);
            let (trouble, step, times) = &self.settings.trouble;
            let now = run.state.step == *step && times.fetch_add(1, Ordering::SeqCst) == 0;
            if now && *trouble == Trouble::Stop {
                run.cancel.cancel();
            }
            if now && *trouble == Trouble::Panic {
                run.learn(Panics, run.learning_rate(), 1.0).await?;
            }
            updates.add(run.learn(demonstrations, run.learning_rate(), 1.0).await?);
            self.settings.offline.step(run, updates, Stats::new(), Seconds::default())
        })
    }

    fn evaluate<'a>(&'a mut self, _: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(async { Ok(None) })
    }
}

#[derive(Debug)]
struct Panics;

impl Objective for Panics {
    fn accumulate(&self, _: &mut Pass<'_>) -> rehearsal::actors::Result<()> {
        panic!("the device fell off the bus")
    }
}

/// A job of six steps, on rows beside its directory.
fn twice(folder: &Path, name: &str, every_steps: u64, trouble: (Trouble, u64)) -> Config {
    let data = folder.join("rows.jsonl");
    let row = |i: usize| format!("{{\"prompt\": \"Question {i}?\", \"completion\": \"Answer {i}, please.\"}}\n");
    std::fs::write(&data, (0..24).map(row).collect::<String>()).unwrap();
    let algorithms = Algorithms::default().with("twice", || Box::new(Twice::default()));
    let mut config = algorithms.config("twice", folder.join(name)).unwrap();
    config.common.job.steps = 6;
    config.common.checkpoint.every_steps = every_steps;
    config.common.optimizer.learning_rate = 1e-3;
    config.common.evaluation.every_steps = 0;
    let settings = config.algorithm_as_mut::<Twice>().unwrap();
    settings.offline.data.train = vec![data];
    settings.offline.data.batch_size = 4;
    settings.trouble = (trouble.0, trouble.1, Arc::default());
    config
}

fn run(config: Config) -> (Result<Outcome>, Vec<Event>) {
    let job = Job::builder(config).build().unwrap();
    let mut events = job.events();
    let outcome = runtime().block_on(job.run(CancellationToken::new()));
    (outcome, std::iter::from_fn(|| events.try_recv().ok()).collect())
}

#[test]
fn a_stop_between_two_updates_of_a_step_leaves_the_state_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = |name: &str, trouble| twice(folder.path(), name, 2, trouble);
    run(config("whole", (Trouble::None, 0))).0.unwrap();
    // Step 3 has been taken, and step 2 is the last that is saved; of step 4 one update has been made.
    let outcome = run(config("stopped", (Trouble::Stop, 3))).0.unwrap();
    assert!(outcome.stopped);
    assert_eq!(outcome.step, 2, "half a step was saved as a whole one");
    let job = Job::builder(config("stopped", (Trouble::None, 0))).build().unwrap();
    assert_eq!(runtime().block_on(job.resume(CancellationToken::new())).unwrap().step, 6);
    Remains::of(&folder.path().join("stopped")).assert_same(&Remains::of(&folder.path().join("whole")));
}

#[test]
fn a_policy_that_dies_goes_on_from_its_checkpoint_or_from_the_start() {
    let folder = tempfile::tempdir().unwrap();
    run(twice(folder.path(), "whole", 50, (Trouble::None, 0))).0.unwrap();
    for every_steps in [2, 50] {
        let name = format!("every-{every_steps}");
        let (outcome, events) = run(twice(folder.path(), &name, every_steps, (Trouble::Panic, 3)));
        assert_eq!(outcome.unwrap().step, 6);
        let restarted = |e: &&Event| matches!(e, Event::RoleRestarted { role: "policy", .. });
        assert_eq!(events.iter().filter(restarted).count(), 1);
        Remains::of(&folder.path().join(&name)).assert_same(&Remains::of(&folder.path().join("whole")));
    }
}

/// The example, working in a directory.
fn example(directory: &Path) -> Command {
    let mut command = crate::support::example("own_algorithm");
    command.arg(directory);
    command
}

/// Reads the example's output up to a step, and kills it there.
fn kill_at(mut child: Child, step: u32) {
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
    let found = lines.any(|line| line.starts_with(&format!("step {step:2} ")));
    assert!(found, "the example ended before step {step}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_example_is_killed_and_resumes_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let output = example(&whole).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("30 steps done"), "{}", stdout(&output));
    for step in [3, 11, 12, 24] {
        kill_at(example(&killed).stdout(Stdio::piped()).spawn().unwrap(), step);
    }
    assert!(example(&killed).status().unwrap().success());
    Remains::of(&killed).assert_same(&Remains::of(&whole));

    // The command does not know the algorithm, but reads what every job has.
    let job = killed.to_str().unwrap();
    assert!(stdout(&rehearsal(&["status", job])).contains("best_of_n: step 30 of 30"));
    let answer = rehearsal(&["generate", job, "What does the fox do?"]);
    assert!(answer.status.success() && !stdout(&answer).trim().is_empty(), "{}", stderr(&answer));
    let error = rehearsal(&["resume", job]);
    assert_eq!(error.status.code(), Some(2));
    assert!(stderr(&error).contains("best_of_n"), "{}", stderr(&error));
}
