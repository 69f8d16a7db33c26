//! Roles that die, and what does not depend on threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rehearsal::{CancellationToken, Event, Job, RewardFn, Sample};

use crate::support::{Remains, config, rollout, run, run_with, runtime};

#[test]
fn threads_batches_and_checkpointing_change_no_bit() {
    for more in ["", "[model]\ndtype = \"bf16\"\n"] {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        let mut first = config(&one, 4, more);
        first.common.placement.threads = 1;
        rollout(&mut first).batch = 1;
        let mut second = config(&two, 4, more);
        second.common.placement.threads = 3;
        rollout(&mut second).batch = 8;
        second.common.optimizer.gradient_checkpointing = true;
        run(first).unwrap();
        run(second).unwrap();
        Remains::of(&one).assert_same(&Remains::of(&two));
    }
}

fn words(sample: &Sample) -> Result<f64, String> {
    Ok(sample.completion.split_whitespace().count() as f64)
}

#[test]
fn a_role_that_panics_is_started_again_and_the_job_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let more = "\n[checkpoint]\nevery_steps = 2\n";
    run_with(config(&whole, 6, more), RewardFn::new("words", words)).unwrap();

    let calls = Arc::new(AtomicU32::new(0));
    let panics = RewardFn::new("words", move |sample: &Sample| {
        // Somewhere in the fourth step, once.
        if calls.fetch_add(1, Ordering::SeqCst) == 3 * 8 + 5 {
            panic!("out of my depth");
        }
        words(sample)
    });
    let job = Job::builder(config(&broken, 6, more)).reward(panics).build().unwrap();
    let mut events = job.events();
    let outcome = runtime().block_on(job.run(CancellationToken::new())).unwrap();
    assert_eq!(outcome.step, 6);
    let mut restarted = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let Event::RoleRestarted { role, reason } = event {
            restarted.push((role, reason));
        }
    }
    assert_eq!(restarted.len(), 1, "{restarted:?}");
    assert_eq!(restarted[0].0, "reward");
    assert!(restarted[0].1.contains("out of my depth"), "{restarted:?}");
    Remains::of(&broken).assert_same(&Remains::of(&whole));
}

#[test]
fn a_role_that_always_panics_ends_the_job_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let never = RewardFn::new("never", |_: &Sample| -> Result<f64, String> { panic!("no opinion") });
    let error = run_with(config(&folder.path().join("job"), 2, ""), never).unwrap_err().to_string();
    assert!(error.contains("reward") && error.contains("no opinion"), "{error}");
}
