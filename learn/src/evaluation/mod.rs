//! Evaluation metrics: judge verdicts, win rates, ratings, reward-model accuracy, inter-annotator agreement.

pub mod agreement;
pub mod judge;
pub mod ratings;
pub mod rewardbench;
pub mod winrate;
