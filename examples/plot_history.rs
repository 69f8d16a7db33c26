//! Draws the curves of a job as an SVG: reward, KL, loss, margin, length, and where the time went.
//!
//!     cargo run --example plot_history -- runs/quickstart docs/quickstart.svg "The quickstart"

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

const WIDTH: f64 = 330.0;
const HEIGHT: f64 = 200.0;
const COLOURS: [&str; 4] = ["#2563eb", "#dc2626", "#059669", "#9333ea"];

/// A line or, if `dots`, points.
struct Series {
    name: &'static str,
    points: Vec<(f64, f64)>,
    dots: bool,
}

struct Panel {
    title: &'static str,
    series: Vec<Series>,
}

fn rows(directory: &Path) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(directory.join("history.jsonl"))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

fn number(row: &Value, key: &str) -> Option<f64> {
    key.split('.').try_fold(row, |value, part| value.get(part))?.as_f64()
}

fn line(name: &'static str, rows: &[Value], key: &str) -> Series {
    let points = rows.iter().filter_map(|r| Some((number(r, "step")?, number(r, key)?))).collect();
    Series { name, points, dots: false }
}

/// Only steps that made an update have a loss and a margin.
fn updates(name: &'static str, rows: &[Value], key: &str) -> Series {
    let rows: Vec<Value> = rows.iter().filter(|r| number(r, "pairs") > Some(0.0)).cloned().collect();
    line(name, &rows, key)
}

fn dots(name: &'static str, status: &Value, key: &str) -> Series {
    Series { dots: true, ..line(name, status["evaluations"].as_array().map_or(&[], Vec::as_slice), key) }
}

fn nice(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.01 {
        format!("{value:.1e}")
    } else {
        format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_string()
    }
}

fn draw(svg: &mut String, panel: &Panel, left: f64, top: f64) {
    let all = || panel.series.iter().flat_map(|s| s.points.iter().copied());
    let bound = |pick: fn((f64, f64)) -> f64, f: fn(f64, f64) -> f64| all().map(pick).reduce(f).unwrap_or(0.0);
    let (x0, x1) = (0.0, bound(|p| p.0, f64::max).max(1.0));
    let (low, high) = (bound(|p| p.1, f64::min), bound(|p| p.1, f64::max));
    let pad = ((high - low) * 0.06).max(1e-9);
    let (y0, y1) = (low - pad, high + pad);
    let (w, h) = (WIDTH - 70.0, HEIGHT - 60.0);
    let x = |v: f64| left + 50.0 + (v - x0) / (x1 - x0) * w;
    let y = |v: f64| top + 30.0 + (1.0 - (v - y0) / (y1 - y0)) * h;
    let _ = writeln!(svg, "<text x='{:.0}' y='{:.0}' class='title'>{}</text>", left + 50.0, top + 16.0, panel.title);
    for i in 0..=4 {
        let value = low + (high - low) * f64::from(i) / 4.0;
        let at = y(value);
        let _ = writeln!(svg, "<line x1='{:.1}' x2='{:.1}' y1='{at:.1}' y2='{at:.1}' class='grid'/>", x(x0), x(x1));
        let _ = writeln!(
            svg,
            "<text x='{:.1}' y='{:.1}' class='tick' text-anchor='end'>{}</text>",
            x(x0) - 5.0,
            at + 3.0,
            nice(value)
        );
    }
    for share in [0.0, 0.5, 1.0] {
        let value = x0 + share * (x1 - x0);
        let _ = writeln!(
            svg,
            "<text x='{:.1}' y='{:.1}' class='tick' text-anchor='middle'>{value:.0}</text>",
            x(value),
            top + 45.0 + h
        );
    }
    for (series, colour) in panel.series.iter().zip(COLOURS.iter().cycle()) {
        if series.dots {
            for &(px, py) in &series.points {
                let _ = writeln!(svg, "<circle cx='{:.1}' cy='{:.1}' r='3.5' fill='{colour}'/>", x(px), y(py));
            }
        } else {
            let points: String = series.points.iter().map(|&(px, py)| format!("{:.1},{:.1} ", x(px), y(py))).collect();
            let _ = writeln!(svg, "<polyline points='{points}' stroke='{colour}' class='line'/>");
        }
    }
    let mut at = left + 50.0;
    for (series, colour) in panel.series.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(
            svg,
            "<text x='{at:.0}' y='{:.0}' class='tick' fill='{colour}'>{}</text>",
            top + 27.0,
            series.name
        );
        at += 14.0 + 5.6 * series.name.len() as f64;
    }
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
        Panel {
            title: "Reward",
            series: vec![line("rollouts", &rows, "reward"), dots("held-out prompts", &status, "reward")],
        },
        Panel {
            title: "KL to the reference, nats",
            series: vec![line("rollouts", &rows, "kl"), dots("held-out prompts", &status, "kl")],
        },
        Panel {
            title: "Loss and preference accuracy",
            series: vec![updates("loss", &rows, "loss"), updates("accuracy", &rows, "accuracy")],
        },
        Panel { title: "Implicit reward margin", series: vec![updates("margin", &rows, "margin")] },
        Panel { title: "Tokens of a completion", series: vec![line("tokens", &rows, "completion_tokens")] },
        Panel {
            title: "Seconds of a step",
            series: vec![
                line("total", &rows, "seconds.total"),
                line("generate", &rows, "seconds.generate"),
                line("backward", &rows, "seconds.backward"),
            ],
        },
    ];
    let (columns, lines) = (3, panels.len().div_ceil(3));
    let (width, height) = (WIDTH * columns as f64 + 10.0, HEIGHT * lines as f64 + 40.0);
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0} {height:.0}' font-family='sans-serif'>\n<style>.title{{font-size:12px;\
         font-weight:bold}}.tick{{font-size:10px}}.grid{{stroke:#e5e7eb}}.line{{fill:none;stroke-width:1.5}}</style>\n\
         <rect width='100%' height='100%' fill='white'/>\n<text x='16' y='24' font-size='15' font-weight='bold'>{title}</text>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        draw(&mut svg, panel, WIDTH * (i % columns) as f64, 36.0 + HEIGHT * (i / columns) as f64);
    }
    svg.push_str("</svg>\n");
    std::fs::write(out, svg)?;
    Ok(())
}
