//! Progress display of a job: a bar on a terminal, plain lines elsewhere.

use std::fmt::Write;
use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use super::print::say;
use crate::events::Event;
use crate::summary::StepSummary;

/// A task that shows the events of a job until it ends.
pub struct ProgressDisplay(JoinHandle<()>);

impl ProgressDisplay {
    /// Starts the task on the current runtime.
    pub fn start(mut events: Receiver<Event>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:24} step {pos}/{len}  {msg}  eta {eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self(tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) => show(bar.as_ref(), &event),
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => break,
                }
            }
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
        }))
    }

    /// Waits until all events are shown.
    pub async fn end(self) {
        let _ = self.0.await; // a panic of the display does not fail the job
    }
}

fn show(bar: Option<&ProgressBar>, event: &Event) {
    let line = |text: String| match bar {
        Some(bar) => bar.suspend(|| say!("{text}")),
        None => say!("{text}"),
    };
    match event {
        Event::Started { step, steps, parameters, rows, dropped } => {
            if let Some(bar) = bar {
                bar.set_length(*steps);
                bar.set_position(*step);
                bar.reset_eta();
            }
            line(format!("{:.2} M parameters, {rows} rows, from step {step} to {steps}", *parameters as f64 / 1e6));
            for (reason, d) in &dropped.0 {
                let first = if d.first.is_empty() { String::new() } else { format!(", {} first", d.first) };
                line(format!("{} rows left out: each {reason}{first}", d.rows));
            }
        }
        Event::NodesWanted { address } => line(format!("nodes may join at {address}")),
        Event::Node { node, what } => line(format!("node {node} {what}")),
        Event::ViewerServed { url } => line(format!("viewer at {url}")),
        Event::PeopleWanted { url } => line(format!("waiting for people at {url}")),
        Event::Rollout { done, of, .. } => {
            if let Some(bar) = bar {
                bar.set_message(format!("completions {done}/{of}"));
            }
        }
        Event::Step(s) => {
            let text = summary(s);
            match bar {
                Some(bar) => {
                    bar.set_position(s.step);
                    bar.set_message(text);
                }
                None => say!("step {:5}  {text}", s.step),
            }
        }
        Event::Evaluated(e) => {
            let numbers: Vec<String> = e.stats.iter().map(|(name, value)| format!("{name} {value:.3}")).collect();
            line(format!("held-out at step {}: {}", e.step, numbers.join(", ")));
        }
        Event::Best { step, measure, value } => {
            line(format!("the best {measure} so far is {value:.3}, of step {step}; its model is in the folder best"));
        }
        Event::Checkpoint { step, bytes, took } => {
            line(format!("checkpoint of step {step}: {:.1} MB in {:.2} s", *bytes as f64 / 1e6, took.as_secs_f64()));
        }
        Event::RoleRestarted { role, reason } => {
            line(format!("the {role} died ({reason}) and was restarted; the job continues from the last checkpoint"))
        }
        Event::DiskFull { message } => line(format!("waiting: {message}")),
        Event::Waiting { wait, seconds } => line(format!("waiting for {seconds:.0} s: {wait}")),
        Event::BudgetSpent { message } => line(format!("stopping: {message}")),
        Event::SlowBuild { message } => line(format!("slow: {message}")),
        Event::CheckpointInterval { steps } => {
            line(format!("checkpoints are made every {steps} steps from now, to keep to `checkpoint.overhead`"))
        }
        Event::Repaired { message } => line(format!("repaired: {message}")),
        Event::Paused { step } => line(format!("paused before step {}", step + 1)),
        Event::SampleSkipped { row, reason, .. } => line(format!("a completion of row {row} is left out: {reason}")),
        Event::Scored { .. } | Event::Preferences { .. } => {}
        // The command reports both when it ends.
        Event::Finished(_) | Event::Failed { .. } => {}
    }
}

/// One line of a step: loss, the main metrics of its algorithm, and seconds.
fn summary(s: &StepSummary) -> String {
    let mut text = String::new();
    let shown = [
        ("reward", "reward", 7, 3),
        ("kl", "kl", 7, 3),
        ("preference_accuracy", "accuracy", 5, 3),
        ("margin", "margin", 7, 4),
        ("explained_variance", "explained", 6, 3),
        ("clip_fraction", "clipped", 5, 3),
    ];
    let _ = write!(text, "loss {:7.4}", s.loss);
    for (name, label, width, digits) in shown {
        if let Some(value) = s.stat(name) {
            let _ = write!(text, "  {label} {value:width$.digits$}");
        }
    }
    let _ = write!(text, "  {:5.2} s", s.seconds.total);
    text
}
