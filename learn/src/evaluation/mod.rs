//! Arithmetic of evaluations: verdicts of judges, win rates, ratings, reward-model benchmarks, agreement.

pub mod agreement;
pub mod judge;
pub mod ratings;
pub mod rewardbench;
pub mod winrate;
