//! Report of a comparison of two models as one HTML file without scripts or external resources.

use std::fmt::Write;

use super::models::ModelReport;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;

/// Renders a report. Texts of prompts and completions are escaped.
pub fn html(report: &ModelReport, names: [&str; 2]) -> String {
    let r = report;
    let [first, second] = names.map(escaped);
    let mut out = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"Content-Security-Policy\" \
         content=\"default-src 'none'; style-src 'unsafe-inline'\"><title>Rehearsal: two models</title><style>\
         body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2937}\
         table{border-collapse:collapse;margin:1rem 0}\
         td,th{border-bottom:1px solid #d1d5db;padding:.3rem .8rem;text-align:left;vertical-align:top}\
         td.n{text-align:right;font-variant-numeric:tabular-nums}\
         pre{white-space:pre-wrap;margin:0;font:13px/1.4 ui-monospace,monospace}\
         svg text{font:12px system-ui,sans-serif;fill:#4b5563}</style>",
    );
    let _ = write!(
        out,
        "<h1>{first} against {second}</h1><p>{} prompts, judged by {}.</p><table>",
        r.prompts,
        escaped(&r.by)
    );
    let length_controlled = r.length_controlled.map_or("-".into(), |x| format!("{x:.3}"));
    for (name, value) in [
        ("win / tie / loss", format!("{:.3} / {:.3} / {:.3}", r.win, r.tie, r.loss)),
        ("win rate", format!("{:.3}", r.win_rate)),
        ("confidence interval", format!("{:.3} to {:.3} ({:.0} %)", r.interval.0, r.interval.1, 100.0 * r.confidence)),
        ("win rate at equal lengths", length_controlled),
        ("mean score", format!("{:.3} against {:.3}", r.first_score, r.second_score)),
        ("mean tokens", format!("{:.1} against {:.1}", r.first_tokens, r.second_tokens)),
    ] {
        let _ = write!(out, "<tr><th>{name}<td class=\"n\">{value}");
    }
    let _ = write!(out, "</table><h2>Difference of scores by difference of lengths</h2>{}", scatter(r));
    let _ = write!(out, "<h2>Completions</h2><table><tr><th>prompt<th>{first}<th>{second}<th>scores");
    for row in &r.results {
        let _ = write!(
            out,
            "<tr><td><pre>{}</pre><td><pre>{}</pre><td><pre>{}</pre><td class=\"n\">{:.3}<br>{:.3}",
            escaped(&row.prompt),
            escaped(&row.first),
            escaped(&row.second),
            row.first_score,
            row.second_score
        );
    }
    out.push_str("</table></html>\n");
    out
}

/// Scatter plot with a dot for each prompt: difference of lengths on the x axis, of scores on the y axis.
fn scatter(r: &ModelReport) -> String {
    let points: Vec<(f64, f64)> = r
        .results
        .iter()
        .map(|p| (p.first_tokens as f64 - p.second_tokens as f64, p.first_score - p.second_score))
        .collect();
    let most = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(1e-9, |m, x| f64::max(m, x.abs()));
    let (x_max, y_max) = (most(|p| p.0), most(|p| p.1));
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" role=\"img\" \
         aria-label=\"difference of scores by difference of lengths\">"
    );
    let (cx, cy) = (WIDTH / 2.0, HEIGHT / 2.0);
    let _ = write!(svg, "<path d=\"M20 {cy}H{} M{cx} 10V{}\" stroke=\"#9ca3af\"/>", WIDTH - 20.0, HEIGHT - 20.0);
    for (x, y) in points {
        let (x, y) = (cx + x / x_max * (cx - 30.0), cy - y / y_max * (cy - 30.0));
        let _ = write!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"#2563eb\" fill-opacity=\".6\"/>");
    }
    let _ = write!(
        svg,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">longer by {x_max:.0} tokens</text>\
         <text x=\"{}\" y=\"20\">better by {y_max:.3}</text></svg>",
        WIDTH - 20.0,
        cy + 16.0,
        cx + 6.0
    );
    svg
}

/// Text with HTML's special characters as entities.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::models::PromptResult;

    #[test]
    fn texts_of_models_are_escaped() {
        let hostile = "<script>alert(1)</script><img src=x onerror=\"alert(2)\">";
        let result = PromptResult {
            prompt: hostile.into(),
            first: hostile.into(),
            second: "fine".into(),
            first_score: 1.0,
            second_score: 0.0,
            first_tokens: 3,
            second_tokens: 5,
            reason: String::new(),
        };
        let report = ModelReport {
            by: hostile.into(),
            prompts: 1,
            win: 1.0,
            tie: 0.0,
            loss: 0.0,
            win_rate: 1.0,
            interval: (1.0, 1.0),
            confidence: 0.95,
            length_controlled: None,
            first_tokens: 3.0,
            second_tokens: 5.0,
            first_score: 1.0,
            second_score: 0.0,
            results: vec![result],
        };
        let page = html(&report, ["a<b", "b"]);
        assert!(!page.contains("<script") && !page.contains("<img") && page.contains("&lt;script&gt;"));
        assert!(page.contains("a&lt;b") && page.contains("default-src 'none'"));
    }
}
