//! A running job in the hands of its host: events with their texts, pause, checkpoints, generation, snapshots, the ledger,
//! failure.

use rehearsal::rewards::RuleSource;
use rehearsal::store::Query;
use rehearsal::{Config, Error, ErrorKind, Event, Generate, Job, JobReader, RewardFn, Sample, WeightType};
use tokio::sync::broadcast::Receiver;

use crate::support::{PATIENCE, Remains, config, run, runtime};

/// The next event that `wanted` has an answer to.
async fn next<T>(events: &mut Receiver<Event>, mut wanted: impl FnMut(Event) -> Option<T>) -> T {
    let search = async {
        loop {
            if let Some(found) = wanted(events.recv().await.expect("an event")) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, search).await.expect("the event that is waited for")
}

#[test]
fn a_handle_pauses_reads_generates_saves_and_stops_without_changing_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (directory, whole) = (folder.path().join("job"), folder.path().join("whole"));
    let more = "\n[checkpoint]\nevery_steps = 5\n";
    let snapshot = folder.path().join("snapshot");
    runtime().block_on(async {
        let job = Job::builder(config(&directory, 12, more)).start().await.unwrap();
        let mut events = job.events();
        job.pause();
        let paused = next(&mut events, |event| match event {
            Event::Paused { step } => Some(step),
            _ => None,
        });
        let paused = paused.await;
        assert!(paused < 12, "the job was paused at its end");
        assert_eq!(job.status().step, paused);

        // A paused job answers, by the same weights with the same completion, and saves.
        let fox = || Generate::new("What does the fox do?");
        let generated = job.generate(fox()).await.unwrap();
        assert!(!generated.text.is_empty() && generated.tokens > 0);
        assert_eq!(generated.version, job.status().counters.updates);
        assert_eq!(job.generate(fox()).await.unwrap(), generated);
        assert_eq!(job.checkpoint().await.unwrap(), paused);
        assert_eq!(job.status().checkpoint, (paused > 0).then_some(paused).or(Some(0)));
        assert_eq!(job.snapshot(&snapshot, WeightType::F32).await.unwrap(), paused);
        let out_of_range = Generate { temperature: f64::NAN, ..fox() };
        let error = job.generate(out_of_range).await.unwrap_err();
        assert!(error.to_string().contains("temperature NaN"), "{error}");

        job.unpause();
        let (mut texts, mut scored) = (0, 0);
        let preferences = next(&mut events, |event| match event {
            Event::Rollout { completions, .. } => {
                texts += completions.iter().filter(|c| !c.prompt.is_empty() && !c.completion.is_empty()).count();
                None
            }
            Event::Scored { completions, .. } => {
                scored += completions.iter().filter(|c| c.score.is_finite() && !c.reason.is_empty()).count();
                None
            }
            Event::Preferences { preferences, .. } => Some(preferences),
            _ => None,
        });
        let preferences = preferences.await;
        assert_eq!((texts, scored, preferences.len()), (8, 8, 4));
        // What was told is what the ledger has, while the job runs.
        let steps = Some(preferences[0].step..preferences[0].step + 1);
        let ledger = job.reader().preferences(Query { steps, ..Query::default() }).await.unwrap();
        assert_eq!(ledger, preferences.to_vec());
        assert_eq!(job.reader().rollouts(preferences[0].step).await.unwrap().completions.len(), 8);

        next(&mut events, |event| matches!(event, Event::Step(_)).then_some(())).await;
        job.stop();
        let outcome = job.wait().await.unwrap();
        assert!(outcome.stopped && outcome.step > paused && outcome.step < 12, "{outcome:?}");
        assert_eq!(job.wait().await.unwrap(), outcome, "every caller gets the outcome");
        assert!(matches!(job.checkpoint().await, Err(Error::Ended)));
        assert!(matches!(job.generate(fox()).await, Err(Error::Ended)));
        assert!(matches!(job.reader().preferences(Query::default()).await, Err(Error::Ended)));

        // The store answers now, and the job goes on from it.
        let reader = JobReader::open(&directory).await.unwrap();
        assert!(!reader.is_running());
        assert_eq!(reader.status().await.unwrap().step, outcome.step);
        assert!(reader.preferences(Query::default()).await.unwrap().len() as u64 >= 4 * outcome.step);
        drop(reader);
        let job = Job::builder(config(&directory, 12, more)).start_or_resume().await.unwrap();
        assert_eq!(job.wait().await.unwrap().step, 12);
    });
    assert!(rehearsal::lm::Checkpoint::open(&snapshot).is_ok());
    run(config(&whole, 12, more)).unwrap();
    Remains::of(&directory).assert_same(&Remains::of(&whole));
}

#[test]
fn a_job_that_fails_says_so_to_all_who_watch_and_wait() {
    let folder = tempfile::tempdir().unwrap();
    let fails = RewardFn::new("fails", |_: &Sample| Err::<f64, _>("no idea"));
    runtime().block_on(async {
        let job = Job::builder(config(&folder.path().join("job"), 4, "")).reward(fails).start().await.unwrap();
        let mut events = job.events();
        let error = job.wait().await.unwrap_err().to_string();
        assert!(error.contains("no idea"), "{error}");
        let told = next(&mut events, |event| match event {
            Event::Failed { message, kind } => Some((kind, message)),
            _ => None,
        });
        assert_eq!(told.await, (ErrorKind::Role, error));
        assert!(job.is_ended());
    });
}

#[test]
fn what_can_fail_early_fails_before_there_is_a_handle() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("job");
    runtime().block_on(async {
        let mut config = Config::new(&directory);
        config.reward::<RuleSource>().unwrap().rules = vec!["length_window".into()];
        config.common.optimizer.learning_rate = f64::NAN;
        let error = Job::builder(config).start().await.err().unwrap().to_string();
        assert!(error.contains("optimizer.learning_rate"), "{error}");
        assert!(!directory.exists());
        let error = Job::builder(crate::support::config(&directory, 2, "")).resume().await.err().unwrap();
        assert!(matches!(error, Error::NothingToResume(_)), "{error}");
        let first = Job::builder(crate::support::config(&directory, 2, "")).start().await.unwrap();
        first.wait().await.unwrap();
        let error = Job::builder(crate::support::config(&directory, 2, "")).start().await.err().unwrap();
        assert!(matches!(error, Error::Exists(_)), "{error}");
    });
}

#[test]
fn a_directory_with_something_else_is_not_replaced_by_a_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let (directory, other) = (folder.path().join("job"), folder.path().join("other"));
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("thesis.txt"), "years of work").unwrap();
    runtime().block_on(async {
        let job = Job::builder(config(&directory, 3, "")).start().await.unwrap();
        job.pause();
        let error = job.snapshot(&other, WeightType::F32).await.unwrap_err();
        assert!(error.to_string().contains("holds no model"), "{error}");
        // The job is none the worse for it.
        job.unpause();
        assert_eq!(job.wait().await.unwrap().step, 3);
    });
    assert_eq!(std::fs::read_to_string(other.join("thesis.txt")).unwrap(), "years of work");
}
