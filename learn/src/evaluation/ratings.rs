//! Ratings of models from pairwise games: Elo, which depends on their order, and Bradley–Terry, which does not.

use crate::{Error, Result};

/// A game between two models; the outcome for the first is 1 for a win, ½ for a tie, 0 for a loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Game {
    /// Index of the first model.
    pub first: usize,
    /// Index of the second model.
    pub second: usize,
    /// Result for the first model, from 0 to 1.
    pub outcome: f64,
}

/// Scale of ratings: a difference of `points` is a factor of `base` in the odds (400 and 10 by default).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Difference of ratings that `base` belongs to.
    pub points: f64,
    /// Factor in the odds for a difference of `points`.
    pub base: f64,
    /// Initial Elo rating, and the Bradley–Terry rating of an average model.
    pub start: f64,
}

impl Default for Scale {
    fn default() -> Self {
        Self { points: 400.0, base: 10.0, start: 1000.0 }
    }
}

/// Elo ratings after the games in the given order, with update factor `k` (Elo 1978; as in FastChat).
///
/// Fails if a game names a model that does not exist, or one model twice.
pub fn elo(games: &[Game], models: usize, k: f64, scale: &Scale) -> Result<Vec<f64>> {
    check(games, models)?;
    let mut ratings = vec![scale.start; models];
    for g in games {
        let gap = (ratings[g.second] - ratings[g.first]) / scale.points;
        let expected = 1.0 / (1.0 + scale.base.powf(gap));
        let change = k * (g.outcome - expected);
        ratings[g.first] += change;
        ratings[g.second] -= change;
    }
    Ok(ratings)
}

/// Bradley–Terry strengths of models.
#[derive(Debug, Clone, PartialEq)]
pub struct BradleyTerry {
    /// Strengths in log-odds, with mean 0: `P(first beats second) = σ(θ_first - θ_second)`.
    pub theta: Vec<f64>,
    /// Negative log-likelihood, summed over games.
    pub nll: f64,
}

impl BradleyTerry {
    /// Strengths as ratings on an Elo scale.
    pub fn ratings(&self, scale: &Scale) -> Vec<f64> {
        self.theta.iter().map(|t| scale.start + t * scale.points / scale.base.ln()).collect()
    }
}

/// Fits Bradley–Terry strengths (Bradley & Terry 1952) by maximum likelihood with Newton's method; a tie is half a win
/// for each.
///
/// Fails like [`elo`], and if a model is not connected to every other by chains of wins or ties in both directions: its
/// strength would be unbounded.
pub fn bradley_terry(games: &[Game], models: usize) -> Result<BradleyTerry> {
    check(games, models)?;
    connected(games, models)?;
    let probability = |theta: &[f64], g: &Game| 1.0 / (1.0 + (theta[g.second] - theta[g.first]).exp());
    let mut theta = vec![0.0; models];
    for _ in 0..200 {
        let mut gradient = vec![0.0; models];
        // The likelihood does not depend on the mean; adding the all-ones matrix to the Hessian fixes it.
        let mut hessian = vec![vec![1.0; models]; models];
        for g in games {
            let p = probability(&theta, g);
            let (error, weight) = (p - g.outcome, p * (1.0 - p));
            gradient[g.first] += error;
            gradient[g.second] -= error;
            for (a, b, sign) in [
                (g.first, g.first, 1.0),
                (g.second, g.second, 1.0),
                (g.first, g.second, -1.0),
                (g.second, g.first, -1.0),
            ] {
                hessian[a][b] += sign * weight;
            }
        }
        let step = solve(hessian, gradient);
        let largest = step.iter().fold(0.0f64, |m, s| m.max(s.abs()));
        // Far from the optimum a full step may overshoot.
        let damp = if largest > 1.0 { 1.0 / largest } else { 1.0 };
        theta.iter_mut().zip(&step).for_each(|(t, s)| *t -= damp * s);
        if largest < 1e-13 {
            break;
        }
    }
    let mean = theta.iter().sum::<f64>() / models as f64;
    theta.iter_mut().for_each(|t| *t -= mean);
    let nll = |g: &Game| {
        let p = probability(&theta, g);
        -(g.outcome * p.ln() + (1.0 - g.outcome) * (1.0 - p).ln())
    };
    Ok(BradleyTerry { nll: games.iter().map(nll).sum(), theta })
}

fn check(games: &[Game], models: usize) -> Result<()> {
    match games.iter().find(|g| g.first.max(g.second) >= models || g.first == g.second) {
        Some(g) => Err(Error::Ratings(format!(
            "a game of model {} against model {} is invalid: the models must differ and be below {models}",
            g.first, g.second
        ))),
        None => Ok(()),
    }
}

/// Checks that chains of wins or ties lead from model 0 to every other and back.
fn connected(games: &[Game], models: usize) -> Result<()> {
    for forwards in [true, false] {
        let mut reached = vec![false; models];
        let mut stack = vec![0];
        while let Some(model) = stack.pop() {
            if std::mem::replace(&mut reached[model], true) {
                continue;
            }
            for g in games {
                let edges = [(g.first, g.second, g.outcome > 0.0), (g.second, g.first, g.outcome < 1.0)];
                for (winner, loser, won) in edges.into_iter().filter(|e| e.2) {
                    let (from, to) = if forwards { (winner, loser) } else { (loser, winner) };
                    if won && from == model {
                        stack.push(to);
                    }
                }
            }
        }
        if let Some(isolated) = reached.iter().position(|r| !r) {
            let what = if forwards { "loses to" } else { "wins against" };
            return Err(Error::Ratings(format!(
                "model {isolated} never {what} the others, directly or through other models, so its strength is \
                 unbounded; play more games, or leave it out"
            )));
        }
    }
    Ok(())
}

/// Gauss–Jordan elimination with pivoting; the matrix is symmetric and positive definite.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for column in 0..n {
        let pivot = (column..n).max_by(|&x, &y| a[x][column].abs().total_cmp(&a[y][column].abs())).unwrap_or(column);
        a.swap(column, pivot);
        b.swap(column, pivot);
        let (top, top_b) = (a[column].clone(), b[column]);
        for row in (0..n).filter(|&r| r != column) {
            let factor = a[row][column] / top[column];
            a[row].iter_mut().zip(&top).for_each(|(x, t)| *x -= factor * t);
            b[row] -= factor * top_b;
        }
    }
    (0..n).map(|i| b[i] / a[i][i]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_always_loses_is_named() {
        let game = |first, second, outcome| Game { first, second, outcome };
        let error = bradley_terry(&[game(0, 1, 0.5), game(0, 2, 1.0), game(1, 2, 1.0)], 3).unwrap_err().to_string();
        assert!(error.contains("model 2 never wins"), "{error}");
        assert!(bradley_terry(&[game(0, 1, 0.5), game(1, 1, 0.5)], 2).is_err());
        assert!(elo(&[game(0, 5, 0.5)], 2, 4.0, &Scale::default()).is_err());
    }
}
