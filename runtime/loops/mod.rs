//! One page for each algorithm, and what several of them share.

mod dpo;
mod iterative;
mod online_dpo;
mod ppo;
mod reward_model;
mod round;
mod sft;
mod shared;

use crate::config::methods::Algorithm;
use crate::error::Result;
use crate::run::Run;

/// Runs a job's algorithm until its last step; an error says why not.
pub(crate) async fn run(run: &mut Run) -> Result<()> {
    match run.config.job.algorithm {
        Algorithm::Sft => sft::sft(run).await,
        Algorithm::RewardModel => reward_model::reward_model(run).await,
        Algorithm::Dpo => dpo::dpo(run).await,
        Algorithm::OnlineDpo => online_dpo::online_dpo(run).await,
        Algorithm::Ppo => ppo::ppo(run).await,
        Algorithm::IterativeDpo => iterative::iterative_dpo(run).await,
        Algorithm::Rso => iterative::rso(run).await,
    }
}

pub(crate) use reward_model::finish as finish_reward_model;
