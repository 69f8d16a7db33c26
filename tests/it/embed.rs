//! The library inside a host: its runtime, its recorder, its events, its cancellation.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rehearsal::{CancellationToken, Event, Job, RewardFn, Sample, exporter};

use crate::support::{PATIENCE, Remains, config, rollout, runtime};

fn brief() -> RewardFn<impl Fn(&Sample) -> Result<f64, String>> {
    RewardFn::new("brief", |s: &Sample| Ok::<_, String>(-(s.tokens as f64)))
}

#[test]
fn a_host_watches_stops_and_resumes_a_job() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("job");
    runtime().block_on(async {
        let cancel = CancellationToken::new();
        // The fourth step's answers are scored once the job is asked to stop, so that it does not end before.
        let (stopped, scored) = (cancel.clone(), AtomicUsize::new(0));
        let waits = RewardFn::new("brief", move |s: &Sample| {
            while scored.load(Ordering::SeqCst) >= 3 * 8 && !stopped.is_cancelled() {
                std::thread::yield_now();
            }
            scored.fetch_add(1, Ordering::SeqCst);
            Ok::<_, String>(-(s.tokens as f64))
        });
        let job = Job::builder(config(&directory, 12, "")).reward(waits).build().unwrap();
        let mut events = job.events();
        let running = tokio::spawn(job.run(cancel.clone()));
        let mut steps = 0;
        while steps < 3 {
            if let Event::Step(step) = events.recv().await.unwrap() {
                steps = step.step;
            }
        }
        cancel.cancel();
        let outcome = tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
        assert!(outcome.stopped && outcome.step >= 3 && outcome.step < 12, "{outcome:?}");

        let recorder = Arc::new(exporter::recorder());
        let handle = recorder.handle();
        let job = Job::builder(config(&directory, 12, "")).reward(brief()).recorder(recorder).build().unwrap();
        let outcome = job.resume(CancellationToken::new()).await.unwrap();
        assert!(!outcome.stopped && outcome.step == 12);
        let text = handle.render();
        // Counters of the algorithm are those of the whole job, not of this process.
        assert!(text.contains("rehearsal_steps_total 12"), "{text}");
        assert!(text.contains("rehearsal_rollouts_total 96"), "{text}");
    });

    let whole = folder.path().join("whole");
    let job = Job::builder(config(&whole, 12, "")).reward(brief()).build().unwrap();
    runtime().block_on(job.run(CancellationToken::new())).unwrap();
    Remains::of(&directory).assert_same(&Remains::of(&whole));
}

#[test]
fn the_hosts_recorder_is_not_touched_by_a_job_without_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let host = exporter::recorder();
    let handle = host.handle();
    // Only this thread's recorder could be found by a job that used the macros at run time.
    metrics::with_local_recorder(&host, || {
        let job = Job::builder(config(&folder.path().join("job"), 1, "")).build().unwrap();
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        rt.block_on(job.run(CancellationToken::new())).unwrap();
    });
    assert!(!handle.render().contains("rehearsal_"), "{}", handle.render());
}

#[test]
fn the_reward_rises_on_the_embedded_model() {
    let folder = tempfile::tempdir().unwrap();
    let more = "\n[evaluation]\nevery_steps = 25\nprompts = 24\n";
    let mut config = config(&folder.path().join("job"), 25, more);
    rollout(&mut config).completions_per_prompt = 4;
    config.common.optimizer.learning_rate = 3e-4;
    let courteous = RewardFn::new("courteous", |s: &Sample| {
        let text = s.completion.to_lowercase();
        let words = ["thank you", "glad", "lovely", "pleasure", "please", "hope"];
        Ok::<_, String>(f64::from(words.iter().any(|w| text.contains(w))))
    });
    let outcome = crate::support::run_with(config, courteous).unwrap();
    let (first, last) = (&outcome.evaluations[0], outcome.evaluations.last().unwrap());
    assert_eq!(first.kl(), 0.0, "at the start the policy is the reference, to the bit");
    assert!(last.reward() > first.reward() + 0.15, "{} -> {}", first.reward(), last.reward());
    assert!(last.kl() > 0.0);
}
