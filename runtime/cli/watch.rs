//! `rehearsal watch`: a job's curves and newest answers in the terminal.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use console::Term;
use rehearsal_store::{Preference, Query, Store};
use serde_json::Value;

use super::print::say;
use super::saved;
use crate::access::{self, JobReader};
use crate::error::{At, Error, Result};
use crate::status::JobStatus;
use crate::view::Curves;

/// Time between two pictures.
const EVERY: Duration = Duration::from_secs(2);
/// Columns of a curve.
const WIDTH: usize = 60;
/// Comparisons that are shown.
const ANSWERS: usize = 2;
/// Heights of a curve.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The numbers that have a curve, with their names.
const CURVES: [(&str, &str); 8] = [
    ("reward", "reward"),
    ("kl", "KL"),
    ("loss", "loss"),
    ("preference_accuracy", "accuracy"),
    ("margin", "margin"),
    ("completion_tokens", "tokens"),
    ("nll", "NLL"),
    ("explained_variance", "explained"),
];

/// Shows the job until it ends; once if it does not run, or nobody looks.
pub fn watch(directory: &Path) -> Result<ExitCode> {
    if !Store::exists(directory) {
        return Err(Error::NothingToResume(directory.into()));
    }
    saved::block_on(async {
        let (term, mut curves, mut drawn) = (Term::stdout(), Curves::default(), 0);
        let history = directory.join("history.jsonl");
        loop {
            let (status, running) = access::glance(directory).await?;
            curves.refresh(&history).at(&history)?;
            let lines = picture(&status, running, curves.after(0), &newest(directory, &status).await);
            let columns = usize::from(term.size().1).saturating_sub(1);
            let _ = term.clear_last_lines(drawn); // nobody may be looking any more
            for line in &lines {
                say!("{}", line.chars().take(if term.is_term() { columns } else { usize::MAX }).collect::<String>());
            }
            drawn = lines.len();
            if !running || !term.is_term() {
                return Ok(ExitCode::SUCCESS);
            }
            tokio::time::sleep(EVERY).await;
        }
    })
}

/// The newest comparisons; none while the job cannot be read.
async fn newest(directory: &Path, status: &JobStatus) -> Vec<Preference> {
    let Ok(job) = JobReader::open(directory).await else { return Vec::new() };
    let query = Query { steps: Some(status.step.saturating_sub(1)..u64::MAX), ..Query::default() };
    let mut all = job.preferences_page(query).await.unwrap_or_default();
    all.retain(|p| p.overrules().is_none());
    all.truncate(ANSWERS);
    all
}

fn picture(status: &JobStatus, running: bool, history: &[Value], answers: &[Preference]) -> Vec<String> {
    let state = match (running, status.is_done()) {
        (true, _) if status.paused => "paused".to_string(),
        (true, _) => match status.waiting.first() {
            Some(wait) => format!("waits {:.0} s for {}", wait.seconds, wait.wait),
            None => "runs".into(),
        },
        (false, true) => "done".into(),
        (false, false) => "does not run".into(),
    };
    let mut lines = vec![format!("{}: step {} of {}, {state}", status.algorithm, status.step, status.steps)];
    for (key, name) in CURVES {
        let values: Vec<f64> = history.iter().filter_map(|line| line[key].as_f64()).collect();
        if let Some(last) = values.last() {
            lines.push(format!("  {name:10} {} {last:.4}", curve(&values)));
        }
    }
    for p in answers {
        lines.push(format!("  {}", one_line(p.prompt.last())));
        let shown: Vec<(&str, u32)> = match p.pair {
            Some((chosen, rejected)) => vec![("+", chosen), ("-", rejected)],
            None => (0..p.completions.len() as u32).take(2).map(|at| ("=", at)).collect(),
        };
        for (sign, at) in shown {
            let score = p.scores.get(at as usize).copied().unwrap_or(0.0);
            let text = p.completions.get(at as usize).map_or("", String::as_str);
            lines.push(format!("    {sign} {score:7.3}  {}", one_line(text)));
        }
    }
    lines
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A curve in one line: each column is the mean of its share of the values.
fn curve(values: &[f64]) -> String {
    let columns = values.len().min(WIDTH);
    let mean = |at: usize| {
        let part = &values[at * values.len() / columns..(at + 1) * values.len() / columns];
        part.iter().sum::<f64>() / part.len() as f64
    };
    let means: Vec<f64> = (0..columns).map(mean).collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let block = |value: &f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.0 };
        BLOCKS[((share * 7.0).round() as usize).min(7)]
    };
    means.iter().map(block).collect::<String>() + &" ".repeat(WIDTH - columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_a_column_for_each_value_or_share_of_values() {
        assert_eq!(curve(&[0.0, 1.0, 0.5]).trim_end(), "▁█▅");
        assert_eq!(curve(&[2.0]).trim_end(), "▁");
        let long: Vec<f64> = (0..600).map(f64::from).collect();
        let drawn = curve(&long);
        assert_eq!((drawn.chars().count(), drawn.chars().next(), drawn.chars().last()), (WIDTH, Some('▁'), Some('█')));
    }
}
