//! Plots the history of an online job as an SVG: reward, KL, loss, margin, completion length, and seconds by phase.
//!
//!     cargo run --example plot_history -- runs/quickstart docs/quickstart.svg "The quickstart"

mod plot;

use std::path::Path;

use plot::{Panel, Series, against, number, page, rows};
use serde_json::Value;

fn line(name: &str, rows: &[Value], key: &str) -> Series {
    against(name, rows, "step", key)
}

/// A curve over the steps that made an update; the others have neither loss nor margin.
fn updates(name: &str, rows: &[Value], key: &str) -> Series {
    let rows: Vec<Value> = rows.iter().filter(|r| number(r, "pairs") > Some(0.0)).cloned().collect();
    line(name, &rows, key)
}

fn dots(name: &str, status: &Value, key: &str) -> Series {
    Series { dots: true, ..line(name, status["evaluations"].as_array().map_or(&[], Vec::as_slice), key) }
}

fn panel(title: &str, series: Vec<Series>) -> Panel {
    Panel { title: title.into(), series }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, directory, out, title] = arguments.as_slice() else {
        return Err("usage: plot_history JOB_DIRECTORY OUT.svg TITLE".into());
    };
    let directory = Path::new(directory);
    let rows = rows(directory)?;
    let status: Value = serde_json::from_slice(&std::fs::read(directory.join("status.json"))?)?;
    let panels = [
        panel("Reward", vec![line("rollouts", &rows, "reward"), dots("held-out prompts", &status, "reward")]),
        panel(
            "KL to the reference, nats",
            vec![line("rollouts", &rows, "kl"), dots("held-out prompts", &status, "kl")],
        ),
        panel(
            "Loss and preference accuracy",
            vec![updates("loss", &rows, "loss"), updates("accuracy", &rows, "preference_accuracy")],
        ),
        panel("Implicit reward margin", vec![updates("margin", &rows, "margin")]),
        panel("Tokens of a completion", vec![line("tokens", &rows, "completion_tokens")]),
        panel(
            "Seconds of a step",
            vec![
                line("total", &rows, "seconds.total"),
                line("generate", &rows, "seconds.generate"),
                line("backward", &rows, "seconds.backward"),
            ],
        ),
    ];
    std::fs::write(out, page(title, &panels))?;
    Ok(())
}
