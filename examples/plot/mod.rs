//! Line plots as SVG, shared by the examples that plot.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

const WIDTH: f64 = 330.0;
const HEIGHT: f64 = 200.0;
const COLOURS: [&str; 4] = ["#2563eb", "#dc2626", "#059669", "#9333ea"];

/// A line, or points if `dots`.
pub struct Series {
    /// Legend entry; a series without a name has the colour of the one before and no entry.
    pub name: String,
    pub points: Vec<(f64, f64)>,
    pub dots: bool,
}

/// One plot with its own axes.
pub struct Panel {
    pub title: String,
    pub series: Vec<Series>,
}

/// Rows of a job's `history.jsonl`, one for each step.
pub fn rows(directory: &Path) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(directory.join("history.jsonl"))?;
    Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// A number of a row by a dotted key, as `seconds.total`.
pub fn number(row: &Value, key: &str) -> Option<f64> {
    key.split('.').try_fold(row, |value, part| value.get(part))?.as_f64()
}

/// Series of `y` over `x`, of the rows that have both.
pub fn against(name: &str, rows: &[Value], x: &str, y: &str) -> Series {
    let points = rows.iter().filter_map(|r| Some((number(r, x)?, number(r, y)?))).collect();
    Series { name: name.into(), points, dots: false }
}

/// A tick label in few digits.
fn tick_label(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.01 {
        format!("{value:.1e}")
    } else {
        format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_string()
    }
}

/// Appends a panel with its top left corner at `left`, `top`.
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
            tick_label(value)
        );
    }
    for share in [0.0, 0.5, 1.0] {
        let value = x0 + share * (x1 - x0);
        let _ = writeln!(
            svg,
            "<text x='{:.1}' y='{:.1}' class='tick' text-anchor='middle'>{}</text>",
            x(value),
            top + 45.0 + h,
            if x1 < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
        );
    }
    for (series, colour) in coloured(panel) {
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
    for (series, colour) in coloured(panel).filter(|(series, _)| !series.name.is_empty()) {
        let _ = writeln!(
            svg,
            "<text x='{at:.0}' y='{:.0}' class='tick' fill='{colour}'>{}</text>",
            top + 27.0,
            series.name
        );
        at += 14.0 + 5.6 * series.name.len() as f64;
    }
}

/// Each series with its colour.
fn coloured(panel: &Panel) -> impl Iterator<Item = (&Series, &'static str)> {
    let mut named = 0usize;
    panel.series.iter().map(move |series| {
        named += usize::from(!series.name.is_empty());
        (series, COLOURS[named.saturating_sub(1) % COLOURS.len()])
    })
}

/// An SVG of panels, three in a row, under a title.
pub fn page(title: &str, panels: &[Panel]) -> String {
    let (columns, lines) = (panels.len().min(3), panels.len().div_ceil(3));
    let (width, height) = (WIDTH * columns as f64 + 10.0, HEIGHT * lines as f64 + 40.0);
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0} {height:.0}' font-family='sans-serif'>\n\
         <style>.title{{font-size:12px;font-weight:bold}}.tick{{font-size:10px}}.grid{{stroke:#e5e7eb}}\
         .line{{fill:none;stroke-width:1.5}}</style>\n\
         <rect width='100%' height='100%' fill='white'/>\n\
         <text x='16' y='24' font-size='15' font-weight='bold'>{title}</text>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        draw(&mut svg, panel, WIDTH * (i % columns) as f64, 36.0 + HEIGHT * (i / columns) as f64);
    }
    svg.push_str("</svg>\n");
    svg
}
