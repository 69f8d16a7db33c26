//! A job that stands still says on which wait, and no wait is without end.

use std::sync::mpsc;
use std::time::Duration;

use rehearsal::judge::LONGEST_WAIT;
use rehearsal::{Config, Devices, Event, Job, JobBuilder, JobHandle, JobReader, RewardFn, Sample};

use crate::judges::{Act, Server, api, longer};
use crate::kills::disk::Disk;
use crate::support::parts::{Part, skip};
use crate::support::{PATIENCE, config, free_port, rewarded_by, runtime, toml};

const SOON: &str = "\n[checkpoint]\nevery_steps = 1\n[limits]\nnotice_seconds = 1\n";

/// Waits until the job tells of a wait whose name holds `wanted`.
async fn told(job: &JobHandle, wanted: &str) -> String {
    let mut events = job.events();
    let search = async {
        loop {
            if let Event::Waiting { wait, seconds } = events.recv().await.expect("an event")
                && wait.contains(wanted)
            {
                assert!(seconds >= 1.0);
                return wait;
            }
        }
    };
    tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("nobody says {wanted:?}"))
}

/// A closure that gives no answer until the sender is dropped.
fn stuck() -> (mpsc::Sender<()>, JobBuilder, tempfile::TempDir, u16) {
    let (open, closed) = mpsc::channel::<()>();
    let closed = std::sync::Mutex::new(closed);
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let more = format!("{SOON}[metrics]\nlisten = \"127.0.0.1:{port}\"\n");
    let reward = RewardFn::new("slow", move |sample: &Sample| {
        let _ = closed.lock().unwrap().recv();
        Ok::<_, String>(sample.completion.len() as f64)
    });
    let builder = Job::builder(config(&folder.path().join("job"), 2, &more)).reward(reward);
    (open, builder, folder, port)
}

#[test]
fn a_reward_that_does_not_answer_is_named_by_event_status_and_metric() {
    runtime().block_on(async {
        let (open, builder, folder, port) = stuck();
        let job = builder.start().await.unwrap();
        let wait = told(&job, "reward").await;
        assert_eq!(wait, "reward: score by slow");
        let reader = JobReader::open(folder.path().join("job")).await.unwrap();
        let waiting = reader.status().await.unwrap().waiting;
        assert!(waiting.iter().any(|w| w.wait == wait && w.seconds >= 1.0), "{waiting:?}");
        let metrics = tokio::task::spawn_blocking(move || {
            ureq::get(&format!("http://127.0.0.1:{port}/metrics")).call().unwrap().body_mut().read_to_string().unwrap()
        });
        let metrics = metrics.await.unwrap();
        let series = metrics.lines().find(|line| line.starts_with("rehearsal_wait_seconds") && line.contains("reward"));
        let seconds: f64 = series.expect("the metric").split(' ').next_back().unwrap().parse().unwrap();
        assert!(seconds >= 1.0, "{series:?}");
        drop(open);
        assert_eq!(job.wait().await.unwrap().step, 2);
    });
}

#[test]
fn a_reward_that_never_answers_ends_the_job_by_its_deadline() {
    runtime().block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let more = "[limits]\nrequest_seconds = 2\nnotice_seconds = 1\n";
        let (_never, closed) = mpsc::channel::<()>();
        let closed = std::sync::Mutex::new(closed);
        let reward = RewardFn::new("slow", move |_: &Sample| {
            let _ = closed.lock().unwrap().recv_timeout(Duration::from_secs(5));
            Ok::<_, String>(0.0)
        });
        let job = Job::builder(config(&folder.path().join("other"), 2, more)).reward(reward).start().await.unwrap();
        let error = job.wait().await.unwrap_err().to_string();
        assert!(error.contains("reward did not reply within 2s"), "{error}");
    });
}

fn judged_by(folder: &std::path::Path, sections: &str) -> Config {
    let text = rewarded_by(&toml(folder, 1, SOON), sections);
    Config::from_toml(&text, std::path::Path::new(".")).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn a_judge_and_people_are_named() {
    let server = Server::start(|n, body| if n == 0 { Act::Hang } else { longer(body) });
    let folder = tempfile::tempdir().unwrap();
    let judge = api(&server, "").replace("timeout_seconds = 10", "timeout_seconds = 3");
    runtime().block_on(async {
        let job = Job::builder(judged_by(&folder.path().join("judge"), &judge)).start().await.unwrap();
        let wait = told(&job, "reward: score by").await;
        assert!(wait.contains("judge") || wait.contains("m at http"), "{wait}");
        assert_eq!(job.wait().await.unwrap().step, 1);

        let people = judged_by(&folder.path().join("people"), "[people]\nlisten = \"127.0.0.1:0\"\n");
        let job = Job::builder(people).start().await.unwrap();
        assert_eq!(told(&job, "reward").await, "reward: score by people");
        job.stop();
        assert!(job.wait().await.unwrap().stopped);
    });
    assert!(LONGEST_WAIT < Duration::from_secs(32 * 24 * 3600));
}

#[test]
fn a_device_that_somebody_else_holds_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let devices = Devices::new(2).unwrap();
    runtime().block_on(async {
        let job = Job::builder(config(&folder.path().join("job"), 200, SOON)).devices(devices.clone());
        let job = job.start().await.unwrap();
        let holder = tokio::task::spawn_blocking(move || {
            devices.run(rehearsal::actors::Placement::Cpu, || std::thread::sleep(Duration::from_secs(3))).unwrap();
        });
        assert_eq!(told(&job, "device").await, "device: cpu");
        holder.await.unwrap();
        job.stop();
        job.wait().await.unwrap();
    });
}

#[test]
fn a_disk_that_does_not_answer_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Disk::new();
    let session = match disk.mount(folder.path()) {
        Ok(session) => session,
        Err(e) => return skip(Part::Fuse, format_args!("a FUSE file system cannot be mounted: {e}")),
    };
    runtime().block_on(async {
        let job = Job::builder(config(&folder.path().join("job"), 2000, SOON)).start().await.unwrap();
        let mut events = job.events();
        while !matches!(events.recv().await.unwrap(), Event::Checkpoint { .. }) {}
        disk.stall(true);
        let wait = told(&job, ":").await;
        assert!(["archivist: ", "files: "].iter().any(|whom| wait.starts_with(whom)), "{wait}");
        disk.stall(false);
        job.stop();
        assert!(job.wait().await.unwrap().stopped);
    });
    session.umount_and_join().unwrap();
}
