//! A tokio application that runs a job beside its own work, with its own reward function and metrics recorder. It
//! cancels the job halfway and resumes it.
//!
//!     cargo run --example embed_custom_reward

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rehearsal::{CancellationToken, Config, Event, Job, Judged, RewardFn, Sample, exporter};

const SETTINGS: &str = r#"
[job]
directory = "runs/embed_custom_reward"
steps = 24

[rollout]
completions_per_prompt = 4
max_new_tokens = 40
temperature = 1.0

[optimizer]
learning_rate = 2e-4
"#;

/// Reward of this application: 1 if the completion begins with the subject of the question, less the later the subject
/// comes, and 0 if it never comes.
fn on_topic(sample: &Sample) -> Result<Judged, String> {
    let subject =
        sample.prompt.split_whitespace().last().ok_or("an empty prompt")?.trim_matches(|c: char| !c.is_alphabetic());
    let subject = if subject == "like" || subject == "do" {
        sample.prompt.split_whitespace().rev().nth(1).unwrap_or_default()
    } else {
        subject
    };
    let words: Vec<&str> = sample.completion.split_whitespace().collect();
    let place = words.iter().position(|w| w.contains(subject));
    let score = place.map_or(0.0, |p| 1.0 - p as f64 / words.len() as f64);
    Ok(Judged::new(score, format!("`{subject}` at word {place:?} of {}", words.len())))
}

fn job(recorder: Arc<metrics_exporter_prometheus::PrometheusRecorder>) -> Result<Job, Box<dyn std::error::Error>> {
    let config = Config::from_toml(SETTINGS, Path::new("."))?;
    Ok(Job::builder(config).reward(RewardFn::new("on-topic", on_topic)).recorder(recorder).build()?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let _ = std::fs::remove_dir_all("runs/embed_custom_reward"); // of an earlier run
    // The application's own metrics recorder. Nothing global is installed.
    let recorder = Arc::new(exporter::recorder());
    let metrics = recorder.handle();

    // The application's own work continues meanwhile, because the job computes on its own threads.
    let ticks = Arc::new(AtomicU64::new(0));
    let own_work = tokio::spawn({
        let ticks = ticks.clone();
        async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                ticks.fetch_add(1, Ordering::Relaxed);
            }
        }
    });

    // First half: follow the job's events and cancel it after ten steps.
    let stop = CancellationToken::new();
    let first = job(recorder.clone())?;
    let mut events = first.events();
    let running = tokio::spawn(first.run(stop.clone()));
    while let Ok(event) = events.recv().await {
        match event {
            Event::Step(step) => {
                let stat = |name| step.stat(name).unwrap_or_default();
                println!("step {:2}  reward {:.3}  kl {:.4}", step.step, stat("reward"), stat("kl"));
                if step.step == 10 {
                    stop.cancel();
                }
            }
            Event::Finished(_) => break,
            _ => {}
        }
    }
    let outcome = running.await??;
    println!(
        "stopped after step {}; meanwhile the application ticked {} times",
        outcome.step,
        ticks.load(Ordering::Relaxed)
    );

    // Second half: a new job on the same directory continues where the first one stopped.
    let outcome = job(recorder)?.resume(CancellationToken::new()).await?;
    own_work.abort();
    println!("done: {} of {} steps", outcome.step, outcome.steps);
    for line in metrics
        .render()
        .lines()
        .filter(|l| l.starts_with("rehearsal_steps_total") || l.starts_with("rehearsal_pairs_total"))
    {
        println!("{line}");
    }
    Ok(())
}
