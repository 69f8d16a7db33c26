//! A program's own scorers: async, late, failing, panicking, skipped, stopped; and outcomes that are decided once.

use std::collections::BTreeSet;
use std::future::pending;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rehearsal::algorithms::{Advantages, IterativeDpo, OnlineDpo, Ppo, Rso};
use rehearsal::driver::RolloutSettings;
use rehearsal::{
    Algorithms, BlockingScorerFn, Config, Error, ErrorKind, Event, Job, OnFailure, Outcome, RewardFn, Sample, Scorer,
    ScorerFn, ScorerPolicy,
};
use serde_json::Value;

use crate::support::{Remains, config, run_with, runtime};

fn words(sample: &Sample) -> f64 {
    sample.completion.split_whitespace().count() as f64
}

/// One attempt, and one sample at a time.
fn policy(on_failure: OnFailure) -> ScorerPolicy {
    ScorerPolicy { deadline: Duration::from_secs(600), attempts: 1, on_failure, concurrency: 1 }
}

/// Runs a job of a scorer; returns the outcome and the events.
fn run(config: Config, scorer: impl Scorer, policy: ScorerPolicy) -> (Result<Outcome, Arc<Error>>, Vec<Event>) {
    let job = Job::builder(config).scorer(scorer, policy);
    let mut events = job.events();
    let outcome = runtime().block_on(async { job.start_or_resume().await.map_err(Arc::new)?.wait().await });
    (outcome, std::iter::from_fn(|| events.try_recv().ok()).collect())
}

/// Row and reason of each skipped sample.
fn skipped(events: &[Event]) -> Vec<(u64, String)> {
    let of = |event: &Event| match event {
        Event::SampleSkipped { row, reason, .. } => Some((*row, reason.clone())),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

#[test]
fn async_and_blocking_scorers_train_as_a_reward_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    run_with(config(&path("reward"), 4, ""), RewardFn::new("words", |s: &Sample| Ok::<_, String>(words(s)))).unwrap();
    let each = ScorerFn::new("words", |s: Sample| async move {
        tokio::task::yield_now().await;
        Ok::<_, String>(words(&s))
    });
    run(config(&path("async"), 4, ""), each, ScorerPolicy::default()).0.unwrap();
    let blocks = BlockingScorerFn::new("words", |s: &Sample| Ok::<_, String>(words(s)));
    run(config(&path("blocking"), 4, ""), blocks, policy(OnFailure::Fail)).0.unwrap();
    let reward = Remains::of(&path("reward"));
    Remains::of(&path("async")).assert_same(&reward);
    Remains::of(&path("blocking")).assert_same(&reward);
}

#[test]
fn late_panicking_and_failing_samples_are_skipped_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let calls = AtomicU32::new(0);
    let scorer = ScorerFn::new("moody", move |s: Sample| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        async move {
            match call {
                2 => pending().await, // later than any deadline
                5 => panic!("out of my depth"),
                9 => Err("no idea".to_string()),
                12 => Ok(f64::NAN),
                _ => Ok(words(&s)),
            }
        }
    });
    // Every sample but the one that never answers is much quicker.
    let policy = ScorerPolicy { deadline: Duration::from_secs(3), ..policy(OnFailure::Skip) };
    let directory = folder.path().join("job");
    let (outcome, events) = run(config(&directory, 3, ""), scorer, policy);
    assert_eq!(outcome.unwrap().step, 3);
    let reasons: Vec<String> = skipped(&events).into_iter().map(|(_, reason)| reason).collect();
    let wanted = ["no score within 3s", "panicked: out of my depth", "no idea", "the score is NaN"];
    assert_eq!(reasons.len(), wanted.len(), "{reasons:?}");
    for wanted in wanted {
        assert!(reasons.iter().any(|reason| reason.contains(wanted)), "{reasons:?}");
    }
    let history = std::fs::read_to_string(directory.join("history.jsonl")).unwrap();
    let counts: Vec<Value> =
        history.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["skipped"].clone()).collect();
    assert_eq!(counts, [Value::from(2.0), Value::from(2.0), Value::Null]);
    // A skipped completion is in no comparison.
    let ledger = Remains::of(&directory).ledger;
    let compared: usize = ledger.iter().map(|p| p.completions.len()).sum();
    assert_eq!(compared, 3 * 8 - 4);
}

#[test]
fn a_transient_error_ends_nothing_and_a_lasting_one_names_the_row() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let whole = || BlockingScorerFn::new("words", |s: &Sample| Ok::<_, String>(words(s)));
    run(config(&path("whole"), 3, ""), whole(), policy(OnFailure::Fail)).0.unwrap();

    let failed = AtomicBool::new(false);
    let once = BlockingScorerFn::new("words", move |s: &Sample| match failed.swap(true, Ordering::SeqCst) {
        false => Err("the connection was reset".to_string()),
        true => Ok(words(s)),
    });
    let twice = ScorerPolicy { attempts: 2, ..policy(OnFailure::Fail) };
    run(config(&path("transient"), 3, ""), once, twice).0.unwrap();
    Remains::of(&path("transient")).assert_same(&Remains::of(&path("whole")));

    let calls = AtomicU32::new(0);
    let breaks = BlockingScorerFn::new("words", move |s: &Sample| match calls.fetch_add(1, Ordering::SeqCst) {
        0..11 => Ok(words(s)),
        _ => Err("the service is gone".to_string()),
    });
    let error = run(config(&path("broken"), 3, ""), breaks, policy(OnFailure::Fail)).0.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Role);
    let text = error.to_string();
    assert!(text.contains("`words` failed on row") && text.contains("gone (attempt 1 of 1)"), "{text}");
    // Mended, it goes on, and tries the sample again.
    run(config(&path("broken"), 3, ""), whole(), policy(OnFailure::Fail)).0.unwrap();
    Remains::of(&path("broken")).assert_same(&Remains::of(&path("whole")));
}

/// A scorer of injected outcomes: some score, some are skipped. It counts its calls, and never answers after `last`.
fn injected(calls: Arc<AtomicU32>, last: u32) -> impl Scorer {
    ScorerFn::new("injected", move |s: Sample| {
        let call = calls.fetch_add(1, Ordering::SeqCst);
        async move {
            if call >= last {
                return pending().await;
            }
            match s.completion.len() % 4 {
                3 => Err("injected".to_string()),
                n => Ok(n as f64),
            }
        }
    })
}

#[test]
fn outcomes_are_decided_once_and_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (all, first, second) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
    let (_, events) = run(config(&path("whole"), 4, ""), injected(all.clone(), u32::MAX), policy(OnFailure::Skip));
    assert!(!skipped(&events).is_empty() && skipped(&events).len() < 32, "{events:?}");

    // Stopped at the call that is never answered: the sixth of the second step.
    let job = Job::builder(config(&path("cut"), 4, "")).scorer(injected(first.clone(), 13), policy(OnFailure::Skip));
    let outcome = runtime().block_on(async {
        let job = job.start().await.unwrap();
        while first.load(Ordering::SeqCst) < 14 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        job.stop();
        job.wait().await.unwrap()
    });
    assert!(outcome.stopped && outcome.step == 1, "{outcome:?}");
    let logged = {
        let (store, _) = rehearsal::store::Store::open(&path("cut")).unwrap();
        8 + store.scores(1).unwrap().len() as u32
    };
    assert_eq!(logged, 13, "an outcome was there and not logged");
    run(config(&path("cut"), 4, ""), injected(second.clone(), u32::MAX), policy(OnFailure::Skip)).0.unwrap();
    Remains::of(&path("cut")).assert_same(&Remains::of(&path("whole")));
    let (all, second) = (all.load(Ordering::SeqCst), second.load(Ordering::SeqCst));
    assert_eq!(logged + second, all, "a sample was asked for twice, or not at all");

    // Whatever a scorer would say now, what is logged stays: of the cut step, some scores are of each scorer.
    let job = Job::builder(config(&path("changed"), 2, ""));
    let job = job.scorer(injected(Arc::default(), 13), policy(OnFailure::Skip));
    let mut events = job.events();
    runtime().block_on(async {
        let job = job.start().await.unwrap();
        while !matches!(events.recv().await.unwrap(), Event::Step(_)) {}
        job.stop();
        job.wait().await.unwrap();
    });
    let logged = {
        let (store, _) = rehearsal::store::Store::open(&path("changed")).unwrap();
        store.scores(1).unwrap().into_iter().filter(|score| !score.skipped).map(|score| score.score)
    };
    let logged: Vec<f64> = logged.collect();
    let changed =
        ScorerFn::new("injected", |s: Sample| async move { Ok::<_, String>(100.0 + s.completion.len() as f64) });
    run(config(&path("changed"), 2, ""), changed, policy(OnFailure::Skip)).0.unwrap();
    let ledger = Remains::of(&path("changed")).ledger;
    let of_second = ledger.iter().filter(|p| p.step == 1).flat_map(|p| &p.scores);
    let (old, new): (Vec<f64>, Vec<f64>) = of_second.partition(|score| **score < 100.0);
    assert_eq!(old.len(), logged.len(), "{old:?} {logged:?}");
    assert!(!new.is_empty() && old.iter().all(|score| logged.contains(score)), "{old:?} {logged:?}");
}

#[test]
fn a_stop_does_not_wait_for_a_slow_reward() {
    let folder = tempfile::tempdir().unwrap();
    // Both closures block until the job has ended: a job that waited for them would never end.
    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Mutex::new(blocked);
    let entered = Arc::new(AtomicBool::new(false));
    let slow = |entered: Arc<AtomicBool>, blocked: Mutex<std::sync::mpsc::Receiver<()>>| {
        move |_: &Sample| {
            entered.store(true, Ordering::SeqCst);
            let _ = blocked.lock().unwrap().recv();
            Err::<f64, _>("released".to_string())
        }
    };
    let stop = |job: rehearsal::JobBuilder, entered: Arc<AtomicBool>| async move {
        let job = job.start().await.unwrap();
        while !entered.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        job.stop();
        job.wait().await.unwrap()
    };
    let reward = RewardFn::new("slow", slow(entered.clone(), blocked));
    let rt = runtime();
    let job = Job::builder(config(&folder.path().join("reward"), 2, "")).reward(reward);
    assert!(rt.block_on(stop(job, entered)).stopped);
    drop(release);

    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let entered = Arc::new(AtomicBool::new(false));
    let scorer = BlockingScorerFn::new("slow", slow(entered.clone(), Mutex::new(blocked)));
    let job = Job::builder(config(&folder.path().join("scorer"), 2, "")).scorer(scorer, ScorerPolicy::default());
    assert!(rt.block_on(stop(job, entered)).stopped);
    drop(release);
}

/// Small rollouts.
fn small(rollout: &mut RolloutSettings) {
    (rollout.prompts_per_step, rollout.completions_per_prompt, rollout.max_new_tokens) = (3, 3, 12);
}

/// A job of each algorithm that scores completions.
fn online(folder: &Path) -> Vec<Config> {
    let mut all = Vec::new();
    let mut add = |name: &str, algorithm: &str, set: &dyn Fn(&mut Config)| {
        let mut config = Algorithms::default().config(algorithm, folder.join(name)).unwrap();
        config.common.job.steps = 3;
        config.common.evaluation.every_steps = 0;
        set(&mut config);
        all.push(config);
    };
    add("online_dpo", "online_dpo", &|c| small(&mut c.algorithm_as_mut::<OnlineDpo>().unwrap().online.rollout));
    for (name, advantages) in [
        ("gae", Advantages::Gae),
        ("rloo", Advantages::Rloo),
        ("grpo", Advantages::Grpo(rehearsal::learn::group::GroupScale::Batch)),
    ] {
        add(name, "ppo", &|c| {
            let ppo = c.algorithm_as_mut::<Ppo>().unwrap();
            small(&mut ppo.online.rollout);
            ppo.ppo.advantages = advantages;
            ppo.update.minibatches = 2;
        });
    }
    add("iterative_dpo", "iterative_dpo", &|c| {
        small(&mut c.algorithm_as_mut::<IterativeDpo>().unwrap().rounds.online.rollout)
    });
    add("rso", "rso", &|c| {
        let rso = c.algorithm_as_mut::<Rso>().unwrap();
        small(&mut rso.rounds.online.rollout);
        rso.keep = 2;
    });
    all
}

#[test]
fn every_algorithm_goes_on_without_the_completions_that_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    for config in online(folder.path()) {
        let directory = config.common.job.directory.clone();
        // One of the first prompt, all of the second; in the second step all; in the third none.
        let calls = AtomicU32::new(0);
        let left_out: BTreeSet<u32> = [1, 3, 4, 5].into_iter().chain(9..18).collect();
        let scorer = BlockingScorerFn::new("partial", move |s: &Sample| {
            let call = calls.fetch_add(1, Ordering::SeqCst);
            match left_out.contains(&call) {
                true => Err("left out".to_string()),
                false => Ok(words(s) + f64::from(call % 2)),
            }
        });
        let (outcome, events) = run(config, scorer, policy(OnFailure::Skip));
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(outcome.unwrap_or_else(|e| panic!("{name}: {e}")).step, 3, "{name}");
        assert_eq!(skipped(&events).len(), 13, "{name}");
        let history = std::fs::read_to_string(directory.join("history.jsonl")).unwrap();
        let rows: Vec<Value> = history.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&rows[0]["skipped"], &rows[1]["skipped"]), (&Value::from(4.0), &Value::from(9.0)), "{name}");
        for row in &rows {
            let text = row.to_string();
            assert!(!text.contains("null"), "{name}: a number that is not finite in {text}");
        }
        assert_eq!(rows[1]["version"], rows[0]["version"], "{name}: an update without completions");
    }
}
