//! Ratings of many models from pairwise comparisons (games).

use std::collections::BTreeMap;
use std::path::Path;

use rehearsal_learn::evaluation::ratings::{Game, Scale, bradley_terry, elo};
use serde::Serialize;

use super::rows::{objects, row_error, text};
use crate::error::{Error, Result};

/// Ratings by model name.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RatingReport {
    /// Number of games.
    pub games: usize,
    /// Bradley–Terry strengths on Elo's scale, with mean 1000; independent of the order of the games.
    pub bradley_terry: BTreeMap<String, f64>,
    /// Elo ratings after all games in file order, with K = 4.
    pub elo: BTreeMap<String, f64>,
}

/// Rates the models of a file with columns `model_a`, `model_b` and `winner` (`model_a`, `model_b` or `tie`).
///
/// Fails if a model never wins against, or never loses to, the rest: its strength would be infinite.
pub fn ratings(file: &Path) -> Result<RatingReport> {
    let mut names: Vec<String> = Vec::new();
    let mut games = Vec::new();
    for (place, row) in objects(file)? {
        let of = |column: &str| text(&row, &[column]).map_err(|e| row_error(file, &place, e));
        let mut index_of = |name: &str| {
            names.iter().position(|n| n == name).unwrap_or_else(|| {
                names.push(name.into());
                names.len() - 1
            })
        };
        let (first, second) = (index_of(of("model_a")?), index_of(of("model_b")?));
        if first == second {
            return Err(row_error(file, &place, "has the same model twice; a game has two"));
        }
        let outcome = match of("winner")? {
            "model_a" => 1.0,
            "model_b" => 0.0,
            winner if winner.starts_with("tie") => 0.5,
            other => {
                let message = format!("has the winner `{other}`; it must be `model_a`, `model_b` or `tie`");
                return Err(row_error(file, &place, message));
            }
        };
        games.push(Game { first, second, outcome });
    }
    let error = |e: rehearsal_learn::Error| {
        // The error names models by index.
        let message = names
            .iter()
            .enumerate()
            .rev()
            .fold(e.to_string(), |m, (i, name)| m.replace(&format!("model {i} "), &format!("`{name}` ")));
        Error::Prompts { file: file.into(), message }
    };
    let scale = Scale::default();
    let strengths = bradley_terry(&games, names.len()).map_err(error)?.ratings(&scale);
    let elo = elo(&games, names.len(), 4.0, &scale).map_err(error)?;
    let named = |x: Vec<f64>| names.iter().cloned().zip(x).collect();
    Ok(RatingReport { games: games.len(), bradley_terry: named(strengths), elo: named(elo) })
}
