//! Plots the evaluations of several jobs together as an SVG. `X:Y` names the axes of a panel by keys of the evaluations
//! in `status.json`.
//!
//!     cargo run --example plot_runs -- docs/frontier.svg "Reward against KL" kl:reward step:tokens \
//!         PPO=runs/instructgpt/03-ppo "online DPO=runs/online_dpo_reward_model"

mod plot;

use std::path::Path;

use plot::{Panel, Series, against, page, rows};
use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, title, rest @ ..] = arguments.as_slice() else {
        return Err("usage: plot_runs OUT.svg TITLE X:Y.. LABEL=JOB_DIRECTORY..".into());
    };
    let mut runs: Vec<(&str, Vec<Value>)> = Vec::new();
    for (label, directory) in rest.iter().filter_map(|a| a.split_once('=')) {
        let status: Value = serde_json::from_slice(&std::fs::read(Path::new(directory).join("status.json"))?)?;
        // A job without evaluations is plotted by its steps.
        let evaluations = match status["evaluations"].as_array() {
            Some(all) if !all.is_empty() => all.clone(),
            _ => rows(Path::new(directory))?,
        };
        runs.push((label, evaluations));
    }
    let axes = rest.iter().filter(|a| !a.contains('=')).filter_map(|a| a.split_once(':'));
    let panels: Vec<Panel> = axes
        .map(|(x, y)| {
            let curves = runs.iter().flat_map(|(label, rows)| {
                let line = against(label, rows, x, y);
                // Points on the curve, in its colour and without a legend entry.
                let dots = Series { name: String::new(), points: line.points.clone(), dots: true };
                [line, dots]
            });
            Panel { title: format!("{y} against {x}"), series: curves.collect() }
        })
        .collect();
    std::fs::write(out, page(title, &panels))?;
    Ok(())
}
