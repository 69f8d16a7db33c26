//! Progress: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use crate::events::Event;

/// Shows events until the job ends.
pub struct Progress(JoinHandle<()>);

impl Progress {
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

    /// Waits until everything has been shown.
    pub async fn end(self) {
        let _ = self.0.await; // a display that failed has nothing more to show
    }
}

fn show(bar: Option<&ProgressBar>, event: &Event) {
    let line = |text: String| match bar {
        Some(bar) => bar.suspend(|| println!("{text}")),
        None => println!("{text}"),
    };
    match event {
        Event::Started { step, steps, parameters, prompts, skipped } => {
            if let Some(bar) = bar {
                bar.set_length(*steps);
                bar.set_position(*step);
                bar.reset_eta();
            }
            let skipped = if *skipped > 0 { format!(" ({skipped} left out)") } else { String::new() };
            line(format!(
                "{:.2} M parameters, {prompts} prompts{skipped}, from step {step} to {steps}",
                *parameters as f64 / 1e6
            ));
        }
        Event::Rollout { done, of, .. } => {
            if let Some(bar) = bar {
                bar.set_message(format!("completions {done}/{of}"));
            }
        }
        Event::Step(s) => {
            let text = format!(
                "reward {:7.3}  kl {:7.3}  loss {:6.4}  margin {:7.4}  pairs {}+{} ties  {:5.2} s",
                s.reward, s.kl, s.loss, s.margin, s.pairs, s.ties, s.seconds.total
            );
            match bar {
                Some(bar) => {
                    bar.set_position(s.step);
                    bar.set_message(text);
                }
                None => println!("step {:5}  {text}", s.step),
            }
        }
        Event::Evaluated(e) => {
            line(format!("held-out at step {}: reward {:.3}, kl {:.3}, {:.1} tokens", e.step, e.reward, e.kl, e.tokens))
        }
        Event::Checkpoint { step, bytes, took } => {
            line(format!("checkpoint of step {step}: {:.1} MB in {:.2} s", *bytes as f64 / 1e6, took.as_secs_f64()));
        }
        Event::RoleRestarted { role, reason } => {
            line(format!("the {role} died ({reason}) and was started again; back to the last checkpoint"))
        }
        Event::DiskFull { message } => line(format!("waiting: {message}")),
        Event::Repaired { message } => line(format!("repaired: {message}")),
        Event::Finished(_) => {}
    }
}
